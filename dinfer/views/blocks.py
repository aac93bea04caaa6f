"""Blocks: the KV of a layer on a rank, fetched block by block, and only what is not here already.

Blocks are known by their digests: what another rank holds alike, or what was here before a step, is not fetched again.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from dinfer.session.kv.source import Shown
from dinfer.views.quantise import Values

LIMIT = 96 << 20
"""bytes that are kept"""
Key = tuple[int, int, int, int, int]
"""(layer, K or V, first token, tokens, digest)"""


class Blocks:
    """Of one run. Used by one thread."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[Key, Values] = OrderedDict()

    def of(self, source: Shown, ranks: Sequence[int], layer: int, tensor: int) -> list[Values]:
        """K (0) or V (1) of a layer as each rank holds it just now, [heads, tokens, dims], from the first token on."""
        subject = source.subject
        spans = [span for span in subject.spans if span]
        found = []
        digests = source.digests(ranks, [layer], spans)
        for rank, held, numbers in zip(ranks, source.held(ranks), digests, strict=True):
            keys = [
                (layer, tensor, span.start, len(span), int(number))
                for span, number in zip(spans[: held.spans[layer]], numbers[0, :, tensor], strict=False)
            ]
            found.append(self._whole(source, rank, keys))
        return found

    def _whole(self, source: Shown, rank: int, keys: Sequence[Key]) -> Values:
        here = {key: self._kept[key] for key in keys if key in self._kept}
        absent = {key for key in keys if key not in here}
        for missing, some in groupby(keys, absent.__contains__):
            if missing:  # neighbours come in one go
                here |= _fetched(source, rank, list(some))
        for key in keys:
            self._keep(key, here[key])
        empty = np.zeros((source.subject.kv_heads, 0, source.subject.head_dim), np.float32)
        return np.concatenate([here[key] for key in keys], axis=1) if keys else empty

    def _keep(self, key: Key, values: Values) -> None:
        if key not in self._kept:
            self._kept[key] = values
            self._bytes += values.nbytes
        self._kept.move_to_end(key)
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


def _fetched(source: Shown, rank: int, keys: list[Key]) -> dict[Key, Values]:
    layer, tensor, first, *_ = keys[0]
    places = range(first, keys[-1][2] + keys[-1][3])
    part = source.part(rank, layer, tensor, range(source.subject.kv_heads), places)
    values = (part if part.element_size() > 4 else part.float()).numpy()
    return {key: values[:, key[2] - first : key[2] - first + key[3]].copy() for key in keys}

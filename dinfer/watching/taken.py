"""What was taken of a watched model, put together: each tensor's rows, what the model was fed, and in which pieces.

Of tensors there are digests and sketches of rows, see `probe.rows`; the values are gone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dinfer.errors import NotPossible
from dinfer.watch.probe.digests import SKETCH
from dinfer.watch.probe.rows import RowsTaken
from dinfer.watch.probe.tensors import HIDDEN, IDS, OUTPUT

T = TypeVar("T")

KV, LOGITS = "kv", "logits"

ORDER = (HIDDEN, "K", "V", OUTPUT, LOGITS)
"""what is compared, in the order in which a layer makes it"""

AFTER_ALL = 1 << 30
"""the layer of logits: behind all others"""


class Rows(NamedTuple):
    """Rows of one tensor, from the place `start` on: `digests` int64 [rows], `sketches` float32 [rows, SKETCH] or None,
    and the dtype of the values."""

    start: int
    digests: Tensor
    sketches: Tensor | None
    dtype: str

    @property
    def stop(self) -> int:
        return self.start + len(self.digests)


TapKey = tuple[int, int, str]
"""sequence of the batch, layer, and one of ORDER"""


class FedSequence(NamedTuple):
    """What one sequence of the batch was fed: token ids; for each whether it is attended to, or only padding; and its
    position, None for all as transformers numbers them."""

    ids: list[int]
    is_attended: list[bool]
    positions: list[int] | None = None

    @property
    def mask(self) -> list[int] | None:
        """As a model takes it; None if there is no padding."""
        return None if all(self.is_attended) else [int(one) for one in self.is_attended]


def newest(rows: Sequence[RowsTaken]) -> list[RowsTaken]:
    """Of the cache that was used last; what belongs to no cache, all."""
    newest = max((one.cache for one in rows), default=0)
    return [one for one in rows if one.cache in (0, newest)]


def tensors_of(rows: Sequence[RowsTaken]) -> dict[TapKey, list[Rows]]:
    """By tensor its rows, in parts; what was written to the same place again counts, not what it replaced."""
    found: dict[TapKey, dict[int, Rows]] = {}
    for one in rows:
        if one.name.startswith(IDS) or not one.digests or not one.digests[0]:
            continue
        layer = AFTER_ALL if one.name == LOGITS else one.layer
        if layer is None:
            continue
        parts = len(one.digests[0][0])
        digests = _signed(one.digests)
        sketches = None
        if one.sketches:
            sketches = torch.frombuffer(bytearray(one.sketches.tobytes()), dtype=torch.float32)
            sketches = sketches.view(len(one.digests), -1, parts, SKETCH)
        names = "KV" if one.name == KV and parts == 2 else (one.name,)
        for sequence in range(len(one.digests)):
            for n, name in enumerate(names):
                part = None if sketches is None else sketches[sequence, :, n]
                made = Rows(one.start, digests[sequence, :, n], part, one.dtype)
                _put(found.setdefault((sequence, layer, name), {}), range(made.start, made.stop), made)
    return {key: list(parts.values()) for key, parts in found.items()}


def _put(parts: dict[int, T], span: range, part: T) -> None:
    """Put what was written last to these rows into `parts`, by first row. Parts that begin among them are replaced; and
    what is written from the first row on is of another prompt."""
    overlapped = [at for at in parts if span.start == 0 or at in span]
    for at in overlapped:
        del parts[at]
    parts[span.start] = part


def _signed(digests: Sequence[Sequence[tuple[int, ...]]]) -> Tensor:
    """Unsigned numbers of 64 bits as int64 [batch, rows, parts]."""
    half = 1 << 63
    return torch.tensor([[[n - 2 * half if n >= half else n for n in row] for row in one] for one in digests])


def checkpoint_of(taken: Iterable[Sequence[RowsTaken]]) -> str:
    names = {one.name.removeprefix(IDS) for rows in taken for one in rows if one.name.startswith(IDS)}
    names.discard("")
    if len(names) == 1:
        return names.pop()
    many = (
        f"several models were seen ({', '.join(sorted(names))})"
        if names
        else "no model said where it comes from"
    )
    raise NotPossible(
        f'which checkpoint is not known: {many}; give compare("reference", checkpoint="folder").'
    )


def fed_sequences(taken: Iterable[Sequence[RowsTaken]]) -> list[FedSequence]:
    """What each sequence was fed, as the first rank that saw the ids has it."""
    for rows in taken:
        parts: dict[int, RowsTaken] = {}
        for one in rows:
            if one.name.startswith(IDS) and one.digests:
                _put(parts, range(one.start, one.start + len(one.digests[0])), one)
        if not parts:
            continue
        words = [list[tuple[int, ...]]() for _ in next(iter(parts.values())).digests]
        for start in sorted(parts):
            if start != len(words[0]) or len(parts[start].digests) != len(words):
                raise NotPossible(
                    f'the ids that were seen have a gap before token {start}; give compare("reference", ids=[…]).'
                )
            for sequence, digests in enumerate(parts[start].digests):
                words[sequence] += digests
        return [_sequence(of_one) for of_one in words]
    raise NotPossible(
        'the token ids are not known: no whole model of transformers was called; give compare("reference", ids=[…]).'
    )


def _sequence(words: Sequence[tuple[int, ...]]) -> FedSequence:
    """From ids, or ids with what the probe knows of their mask and positions."""
    places = [row[1] if len(row) > 1 else 1 for row in words]
    positions = [place // 2 - 1 if place > 1 else at for at, place in enumerate(places)]
    is_as_counted = positions == list(range(len(words)))
    return FedSequence(
        [row[0] for row in words], [bool(place % 2) for place in places], None if is_as_counted else positions
    )


def pieces_of(taken: Iterable[Sequence[RowsTaken]], tokens: int) -> list[range]:
    """What was fed at a time: by the ids, else by the rows of the first layer that was taken."""
    spans: dict[int, set[range]] = {}
    for rows in taken:
        for one in rows:
            if one.digests and (one.name.startswith(IDS) or one.layer is not None):
                layer = -1 if one.name.startswith(IDS) or one.layer is None else one.layer
                spans.setdefault(layer, set()).add(range(one.start, one.start + len(one.digests[0])))
    found = sorted(spans[min(spans)], key=lambda span: span.start) if spans else []
    ends = [0, *(span.stop for span in found)]
    is_whole = all(span.start == end for span, end in zip(found, ends, strict=False)) and ends[-1] == tokens
    return found if is_whole else [range(tokens)]


def dtype_of(tensors: Iterable[Mapping[TapKey, Sequence[Rows]]]) -> str:
    """That of KV or hidden states."""
    dtypes = [rows[0].dtype for own in tensors for key, rows in own.items() if key[2] != LOGITS]
    return dtypes[0] if dtypes else "auto"

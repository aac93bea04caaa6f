"""Inventory: the blocks and hidden states that one rank holds at this moment. Read only.

The rows of all new tokens count as one more block after the prompt's chunks.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from dinfer.engine.lanes import LaneExecutor
from dinfer.kv.digests import block_digests, row_digests
from dinfer.model.cache import KVCache

InventoryKey = tuple[int, int]
"""chunk and layer"""


class Inventory:
    """What a rank holds. `tokens` are the new tokens; the last of them has no rows, since it has not been fed yet.
    `rows`: how many rows each layer has after decode; 0: there are no new tokens."""

    def __init__(self, executor: LaneExecutor, tokens: Sequence[int], rows: int = 0) -> None:
        self._executor, self.state = executor, executor.state
        self.tokens, self._rows = list(tokens), rows
        self.layers = self.cache.layers

    @property
    def cache(self) -> KVCache:
        return self.state.cache

    @cached_property
    def ids(self) -> list[int]:
        """All tokens of the prompt, and the new ones that have rows."""
        return [*self.state.ids, *self.tokens[:-1]]

    @cached_property
    def chunks(self) -> list[range]:
        """The rows of each chunk, then those of the new tokens."""
        prompt = self._executor.plan.shape.chunks
        new = range(prompt[-1].stop, len(self.ids))
        return [*prompt, new] if new else list(prompt)

    @property
    def prompt_chunks(self) -> int:
        return len(self._executor.plan.shape.chunks)

    def holds(self, chunk: int, layer: int) -> bool:
        return chunk >= self.prompt_chunks or self._executor.holds_block(chunk, layer)

    def rows_due(self, layer: int) -> int:
        """How many rows a layer should have: those of the chunks that are here, up to the first gap."""
        here = 0
        for chunk, rows in enumerate(self.chunks):
            if not self.holds(chunk, layer):
                break
            here = rows.stop
        return here

    def rows_held(self, layer: int) -> int:
        """How many rows a layer has: more than it should, if rows were appended twice."""
        rows = max(self.rows_due(layer), self._rows) + self.state.extra.get(layer, 0)
        return min(rows, self.cache.capacity)

    def hidden_digests(self) -> dict[InventoryKey, int]:
        """The digests of the hidden states that are kept, by chunk and the layer that they enter; the layer of the
        final one is the number of layers plus 1."""
        kept = dict(self.state.hidden)
        if self.state.final is not None:
            kept[self.prompt_chunks - 1, self.layers + 1] = self.state.final
        found = _on_host([hidden_digest(one) for one in kept.values()])
        return {key: int(digest) for key, digest in zip(kept, found, strict=True)}


def hidden_digest(hidden: Tensor) -> Tensor:
    """The digest of a hidden state [1, tokens, hidden_size]: int64 [1]."""
    rows = row_digests(hidden[0][:, None, None, :])
    return block_digests(rows.expand(-1, 2, -1))[:1]


def zero_row_digest(cache: KVCache) -> int:
    """The digest of a row of zeros."""
    zeros = torch.zeros((1, 2, 1, cache.head_dim), dtype=cache.dtype, device=cache.device)
    return int(row_digests(zeros)[0, 0, 0])


def _on_host(digests: list[Tensor]) -> list[Tensor]:
    """Copied to the host together."""
    return list(torch.stack(digests).cpu()) if digests else []

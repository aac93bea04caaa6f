"""Inventory: the blocks and hidden states that one rank holds at this moment. Read only.

The rows of all new tokens count as one more block after the prompt's chunks.
"""

import sys
from functools import cached_property

import torch
from torch import Tensor

from dinfer.kv.digests import block_digests, row_digests
from dinfer.model.cache import KVCache
from dinfer.rank.decode import PromptOnRank

InventoryKey = tuple[int, int]
"""chunk and layer"""


class Inventory:
    """`tokens` are the new tokens; the last of them has no rows, since it has not been fed yet."""

    def __init__(self, prompt: PromptOnRank) -> None:
        self._executor = prompt.engine.executor
        self.state = self._executor.state
        if self.state.coded.has_unsealed:
            prompt.engine.prompt.detect_edits()  # sealing overwrites them
            self.state.coded.seal_all()
        self.cache = self.state.cache
        self.tokens, self._rows = prompt.tokens.tokens, prompt.tokens.rows
        self.layers = self.cache.layers
        self.prompt_chunks = len(self._executor.plan.shape.chunks)

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

    def holds(self, chunk: int, layer: int) -> bool:
        return chunk >= self.prompt_chunks or self._executor.holds_block(chunk, layer)

    def chunks_held(self, layer: int) -> int:
        """How many chunks of a layer are here, up to the first gap."""
        chunks = range(len(self.chunks))
        return next((chunk for chunk in chunks if not self.holds(chunk, layer)), len(chunks))

    def rows_due(self, layer: int) -> int:
        """How many rows a layer should have: those of the chunks that are here, up to the first gap."""
        count = self.chunks_held(layer)
        return self.chunks[count - 1].stop if count else 0

    def rows_held(self, layer: int) -> int:
        """How many rows a layer has: more than it should, if rows were appended twice."""
        rows = max(self.rows_due(layer), self._rows) + self.state.extra.get(layer, 0)
        return min(rows, self.cache.capacity)

    @property
    def new_rows(self) -> int:
        """How many rows of each layer are of new tokens, as far as each token has one."""
        return len(self.ids) - len(self.state.ids)

    def rows(self, layer: int, start: int = 0, stop: int = sys.maxsize) -> Tensor:
        """Those of a layer's rows [start, stop) that are here, in the cache: [rows, 2, kv_heads, head_dim]."""
        stop = min(stop, self.rows_held(layer))
        return self.cache.block(layer, min(start, stop), stop)

    def hidden_digests(self) -> dict[InventoryKey, int]:
        """The digests of the hidden states that are kept, by chunk and the layer that they enter; the layer of the
        final one is the number of layers plus 1."""
        kept = dict(self.state.hidden)
        if self.state.final is not None:
            kept[self.prompt_chunks - 1, self.layers + 1] = self.state.final
        found = _on_host({key: hidden_digest(hidden) for key, hidden in kept.items()})
        return {key: int(digest) for key, digest in found.items()}


def hidden_digest(hidden: Tensor) -> Tensor:
    """The digest of a hidden state [1, tokens, hidden_size]: int64 [1]."""
    rows = row_digests(hidden[0][:, None, None, :])
    return block_digests(rows.expand(-1, 2, -1))[:1]


def zero_row_digest(cache: KVCache) -> int:
    """The digest of a row of zeros."""
    zeros = torch.zeros((1, 2, 1, cache.head_dim), dtype=cache.dtype, device=cache.device)
    return int(row_digests(zeros)[0, 0, 0])


def _on_host(digests: dict[InventoryKey, Tensor]) -> dict[InventoryKey, Tensor]:
    """Copied to the host together."""
    return dict(zip(digests, torch.stack([*digests.values()]).cpu(), strict=True)) if digests else {}

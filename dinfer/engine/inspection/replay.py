"""Replay: the hidden states of a run, of which only those that entered a stage are kept, computed anew from those.

Each layer's output is computed from the run's own KV of the chunks before and the hidden state that entered, just as
the run has computed it, in memory of its own: the run's KV is read and never written.
"""

from torch import Tensor

from dinfer.engine.inspection.holding import Holding
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder


class Replay:
    """Of one rank. Ask for each chunk's layers in order."""

    def __init__(self, decoder: Decoder, holding: Holding) -> None:
        self._decoder, self._holding = decoder, holding
        self._scratch = _Scratch(holding.cache)
        self._at: dict[int, Tensor | None] = {}

    def hidden(self, chunk: int, rows: range, layer: int) -> Tensor | None:
        """What entered `layer`, [1, tokens, hidden_size], for these rows of that chunk: the very tensor where it is
        kept; None where the run has not come so far, or this rank lacks the KV that made it."""
        kept = self._holding.state.hidden.get((chunk, layer))
        if kept is not None:
            self._at[rows.start] = kept
        elif layer == 0:
            self._at[rows.start] = self._decoder.embed(self._holding.ids[rows.start : rows.stop])
        else:
            self._at[rows.start] = self._next(chunk, rows, layer - 1)
        return self._at[rows.start]

    def _next(self, chunk: int, rows: range, layer: int) -> Tensor | None:
        before = self._at[rows.start]
        if before is None or not all(self._holding.holds(n, layer) for n in range(chunk + 1)):
            return None
        self._scratch.take(self._holding.cache, layer, rows.start)
        return self._decoder.layer(layer, before, self._scratch, rows.start)


class _Scratch(KVCache):
    """Room for one layer's rows, whichever layer it is."""

    def __init__(self, like: KVCache) -> None:
        super().__init__(1, like.capacity, like.kv_heads, like.head_dim, like.dtype, like.device)

    def tensor(self, layer: int) -> Tensor:  # noqa: ARG002 - one place for all
        return self._tensors[0]

    def take(self, cache: KVCache, layer: int, rows: int) -> None:
        self._tensors[0][:rows].copy_(cache.block(layer, 0, rows))

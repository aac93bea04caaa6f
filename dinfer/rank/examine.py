"""Compares transformers' own forward of a prompt and its new tokens with what one rank holds of them.

Every tensor is compared on its device as soon as the forward has made it, and only numbers are kept. The forward may
use other chunks or another dtype than the run did. What a difference means is not decided here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.kv.measure import CellDifference, measure
from dinfer.kv.placement import Misplaced, RowDigests, misplaced
from dinfer.kv.reference.reports import FINAL, TokenChoice
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.reference import Forward
from dinfer.model.sampling import Sampler
from dinfer.rank.inventory import Inventory, InventoryKey, as_rows, empty_digest, hidden_digest


class LayerReplay:
    """Computes anew the hidden states that a rank has not kept. Ask for each chunk's layers in order."""

    def __init__(self, decoder: Decoder, holding: Inventory) -> None:
        self._decoder, self._holding = decoder, holding
        self._scratch = _Scratch(holding.cache)
        self._at: dict[int, Tensor | None] = {}

    def hidden(self, chunk: int, rows: range, layer: int) -> Tensor | None:
        """What entered `layer`, [1, tokens, hidden_size], for these rows of that chunk: the kept tensor if there is
        one; None if the run has not come so far, or this rank lacks the KV to compute it from."""
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


class Examination:
    """Of one rank. `reference`: the model that the forward runs; `chunks`: how many of the prompt's it is to run, all
    of them before the new tokens; `check()` may raise, to end it."""

    def __init__(
        self,
        decoder: Decoder,
        reference: Decoder,
        holding: Inventory,
        sampler: Sampler,
        *,
        chunks: int,
        chunked: bool,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.exact = chunked and reference.dtype == decoder.dtype
        self.measured: dict[tuple[int, int, str], CellDifference] = {}
        self.hidden: dict[InventoryKey, int] = {}
        """digests of the reference's hidden states, or of this rank's where bits may differ"""
        self.choices: list[TokenChoice] = []
        self._holding, self._sampler, self._check = holding, sampler, check
        self._chunked, self._chunks = chunked, chunks
        self._rows: list[list[Tensor]] = [[] for _ in range(holding.layers)]
        self._replay = LayerReplay(decoder, holding)
        self._forward = Forward(reference, self._see)
        self._piece = range(0)

    def run(self) -> None:
        """Feed the prompt, then one by one the run's new tokens. Raises what `check` raises."""
        holding, tokens = self._holding, self._holding.tokens
        for rows in self._pieces():
            self._piece = rows
            fed = self._forward.feed(holding.ids[rows.start : rows.stop])
            if rows.stop == len(holding.state.ids):
                self._compare_final(fed.hidden[:, -1:])
            step = rows.stop - len(holding.state.ids)
            if 0 <= step < len(tokens):
                self._compare_choice(step, tokens[step], fed.logits)

    def expected_rows(self) -> int:
        return self._piece.stop

    def digests(self) -> dict[InventoryKey, tuple[int, int]]:
        """Of the reference's blocks, where they should be equal bit for bit."""
        if not self.exact:
            return {}
        found = {}
        for layer, pieces in enumerate(self._rows):
            rows = torch.cat(pieces)
            for chunk, span in enumerate(self._holding.chunks):
                if span.stop <= len(rows):
                    found[chunk, layer] = as_numbers(block_digests(rows[span.start : span.stop]))
        return found

    def misplaced(self) -> dict[int, list[Misplaced]]:
        """By layer, the rows that lie where others should; without exact rows to look for, only where there are too
        many, and only those that repeat others."""
        empty, blocks = empty_digest(self._holding.cache), self._holding.chunks
        found = {}
        for layer in range(self._holding.layers):
            due, held = self._holding.rows_due(layer), self._holding.rows_held(layer)
            if self.exact and (held != due or self._differs(layer)):
                named = misplaced(self._holding.row_digests(layer), self._wanted(layer)[:due], empty, blocks)
            elif held != due:
                named = [
                    one
                    for one in misplaced(self._holding.row_digests(layer), [], empty)
                    if one.kind == "repeated"
                ]
            else:
                named = []
            if named:
                found[layer] = named
        return found

    def _pieces(self) -> Sequence[range]:
        prompt = self._holding.chunks[: self._chunks]
        if not self._chunked and prompt:
            prompt = [range(prompt[-1].stop)]
        whole = prompt and prompt[-1].stop == len(self._holding.state.ids)
        new = range(len(self._holding.state.ids), len(self._holding.ids)) if whole else ()
        return [*prompt, *(range(at, at + 1) for at in new)]

    def _see(self, what: str, layer: int, tensor: Tensor) -> None:
        self._check()
        if what == "kv" and self.exact:
            self._rows[layer].append(row_digests(tensor))
        for chunk, span in enumerate(self._holding.chunks):
            rows = range(max(span.start, self._piece.start), min(span.stop, self._piece.stop))
            if rows:
                here = slice(rows.start - self._piece.start, rows.stop - self._piece.start)
                if what == "kv":
                    self._compare_block(chunk, layer, rows, tensor[here])
                else:
                    self._compare_hidden(chunk, layer, rows, tensor[:, here])

    def _compare_block(self, chunk: int, layer: int, rows: range, theirs: Tensor) -> None:
        if not self._holding.holds(chunk, layer):
            return
        mine = self._holding.cache.block(layer, rows.start, rows.stop)
        for index, name in enumerate("KV"):
            self._note((chunk, layer, name), measure(mine[:, index], theirs[:, index], rows.start))

    def _compare_hidden(self, chunk: int, layer: int, rows: range, theirs: Tensor) -> None:
        mine = self._replay.hidden(chunk, rows, layer)
        if mine is not None:
            self._note((chunk, layer, "hidden"), measure(mine[0], theirs[0], rows.start))
        told = theirs if self.exact else mine
        if told is not None and chunk < self._holding.prompt_chunks:
            self.hidden[chunk, layer] = int(hidden_digest(told))

    def _compare_final(self, theirs: Tensor) -> None:
        mine, chunk = self._holding.state.final, self._holding.prompt_chunks - 1
        if mine is not None:
            key = (chunk, self._holding.layers + 1)
            self._note((*key, FINAL), measure(mine[0], theirs[0], len(self._holding.state.ids) - 1))
            self.hidden[key] = int(hidden_digest(theirs if self.exact else mine))

    def _compare_choice(self, step: int, token: int, logits: Tensor) -> None:
        chosen = self._sampler(logits, step)
        if chosen != token:
            self.choices.append(TokenChoice(step, token, chosen, float(logits[chosen] - logits[token])))

    def _note(self, key: tuple[int, int, str], found: CellDifference) -> None:
        before = self.measured.get(key)
        self.measured[key] = before.with_(found) if before else found

    def _differs(self, layer: int) -> bool:
        return any(
            one.changed for (_, at, name), one in self.measured.items() if at == layer and name in "KV"
        )

    def _wanted(self, layer: int) -> list[RowDigests]:
        return as_rows(torch.cat(self._rows[layer]))

    def items(self) -> list[dict[str, Any]]:
        """What was measured, in the order in which a run computes it: chunk by chunk, layer by layer, the hidden state
        that enters before the K and V that are made of it."""
        order = {"hidden": 0, FINAL: 0, "K": 1, "V": 2}
        keys = sorted(self.measured, key=lambda key: (key[0], key[1], order[key[2]]))
        return [{"chunk": c, "layer": n, "tensor": t, "measured": self.measured[c, n, t]} for c, n, t in keys]

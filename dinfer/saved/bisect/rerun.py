"""Rerun: a run as it was up to some part, and from there computed again, without ranks and without faults.

Layers run one by one, in the run's chunks, as its ranks ran them; so what is computed again equals, on the same machine
and bit for bit, what a rank computes of the same input.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dinfer.kv.ledger import BlockKey
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.kernels.token_graph import NO_TOKEN
from dinfer.model.sampling import Sampler
from dinfer.saved.bisect.parts import NAMES, RunPart, RunParts, parts_of


@dataclass(frozen=True)
class RerunAnswer:
    """`tokens`: those chosen; for each, the `hidden` state from which, [1, 1, hidden_size], and the float32 `logits`,
    [vocab_size]."""

    tokens: tuple[int, ...]
    hidden: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]

    def error(self, other: "RerunAnswer", what: str, count: int) -> float:
        """The largest absolute difference of the first `count` logits, or hidden states; infinite where one is NaN."""
        pairs = zip(*((getattr(one, what))[:count] for one in (self, other)), strict=False)
        found = 0.0
        for mine, theirs in pairs:
            gap = (mine.float() - theirs.float()).abs().max()
            found = max(found, float(gap) if gap.isfinite() else float("inf"))
        return found


class RerunState:
    """What a rank holds after a rerun: its cache, the final hidden state, and those that were computed again."""

    def __init__(self, cache: KVCache, final: Tensor, hidden: Mapping[BlockKey, Tensor]) -> None:
        self.cache, self.final, self.hidden = cache, final, hidden

    def get(self, part: RunPart, rows: range) -> Tensor | None:
        """That part, as RunParts has it; None for a hidden state that was not computed again."""
        if part.layer == self.cache.layers:
            return self.final
        if part.name == "hidden":
            return self.hidden.get((part.chunk, part.layer))
        return self.cache.block(part.layer, rows.start, rows.stop)[:, NAMES.index(part.name) - 1]


class Reruns:
    """Reruns of `run`, with parts of `other` in the place of its own. `ids`: the prompt; `room`: for new tokens."""

    def __init__(
        self,
        decoder: Decoder,
        ids: Sequence[int],
        run: RunParts,
        other: RunParts,
        sampler: Sampler,
        room: int,
    ) -> None:
        self.run, self.other = run, other
        self.parts = parts_of(run)
        self._decoder, self._sampler = decoder, sampler
        self._ids = decoder.checked_ids(ids)
        self._room = min(room, decoder.max_positions - len(ids) + 1)  # the first new token takes no position
        self._shape = run.plan.shape

    def rows(self, part: RunPart) -> range:
        """The tokens of its chunk."""
        return self._shape.chunks[part.chunk]

    @cached_property
    def target(self) -> RerunAnswer:
        """The other's answer, from what the ranks that computed it held."""
        other = self.other
        theirs = Reruns(self._decoder, self._ids.tolist(), other, other, self._sampler, self._room)
        return theirs.answer(theirs.state(len(theirs.parts)))

    def state(self, kept: int, replaced: Set[RunPart] = frozenset()) -> RerunState:
        """The run's first `kept` parts as they were, but for those `replaced` by the other's; all that follows is
        computed again from them."""
        cache = self._decoder.new_cache(self._shape.tokens + self._room)
        for layer, rows in enumerate(self.run.owned):
            cache.block(layer, 0, len(rows)).copy_(rows)
        given = self._given(kept, replaced)
        owners = self._shape.owners
        for part, tensor in given.items():
            if part in replaced and part.layer < len(owners) and part.rank == owners[part.layer]:
                self._write(cache, part, tensor)
        made = dict[BlockKey, Tensor]()
        final = next((tensor for part, tensor in given.items() if part.layer == len(owners)), None)
        if kept < len(self.parts) or final is None:
            last = RunPart(len(self._shape.chunks) - 1, len(owners) - 1, "V", 0)
            hidden = self._compute(cache, self.parts[kept] if kept < len(self.parts) else last, given, made)
            final = final if final is not None else self._decoder.norm(hidden)[:, -1:].contiguous()
        for part, tensor in given.items():
            if part.layer < len(owners) and part.rank != owners[part.layer]:
                self._write(cache, part, tensor)
        return RerunState(cache, final.to(self._decoder.device), made)

    def answer(self, state: RerunState, forced: Sequence[int] = ()) -> RerunAnswer:
        """The new tokens that a rank makes of that; it is fed `forced` instead of its own, as far as there are any.
        Changes the state's cache."""
        decoder, rows = self._decoder, self._shape.tokens
        tokens, states, logits = list[int](), list[Tensor](), list[Tensor]()
        hidden = state.final
        for step in range(min(len(forced), self._room) if forced else self._room):
            if step:
                fed = forced[step - 1] if forced else tokens[-1]
                hidden = decoder.norm(decoder.forward([fed], state.cache, rows + step - 1))
            scores = decoder.logits(hidden)
            tokens.append(self._sampler(scores, step) if scores.max().isfinite() else NO_TOKEN)
            states.append(hidden)
            logits.append(scores)
            if not forced and (tokens[-1] in decoder.eos_ids or tokens[-1] == NO_TOKEN):
                break
        return RerunAnswer(tuple(tokens), tuple(states), tuple(logits))

    # -- within

    def _given(self, kept: int, replaced: Set[RunPart]) -> dict[RunPart, Tensor]:
        """What is not computed: the other's where it is known, else the run's own among the first `kept`."""
        found = dict[RunPart, Tensor]()
        for part in self.parts[:kept]:
            tensor = (self.other if part in replaced else self.run).get(part, self.rows(part))
            if tensor is not None:
                found[part] = tensor
        return found

    def _write(self, cache: KVCache, part: RunPart, tensor: Tensor) -> None:
        if part.name != "hidden":
            rows = self.rows(part)
            cache.block(part.layer, rows.start, rows.stop)[:, NAMES.index(part.name) - 1].copy_(tensor)

    @torch.no_grad()
    def _compute(
        self, cache: KVCache, first: RunPart, given: Mapping[RunPart, Tensor], made: dict[BlockKey, Tensor]
    ) -> Tensor:
        """Compute all from the chunk of the part `first` on, each part that is given put in the place of the computed
        one; the last hidden state, [1, tokens, hidden_size]. `made` gets those of which the run has its own."""
        owners, hidden = self._shape.owners, torch.empty(0)  # the loop runs at least once
        for chunk in range(first.chunk, len(self._shape.chunks)):
            rows = self._shape.chunks[chunk]
            start = self._entry(chunk, first, given)
            if start == 0:
                hidden = self._decoder.embed_known(self._ids[rows.start : rows.stop])
            for layer in range(start, len(owners)):
                entered = RunPart(chunk, layer, "hidden", owners[layer])
                if (known := given.get(entered)) is not None:
                    hidden = known.to(self._decoder.device)
                elif (chunk, layer) in self.run.hidden:
                    made[chunk, layer] = hidden
                hidden = self._decoder.layer(layer, hidden, cache, rows.start)
                block = cache.block(layer, rows.start, rows.stop)
                for index, name in enumerate(NAMES[1:]):
                    if (known := given.get(RunPart(chunk, layer, name, owners[layer]))) is not None:
                        block[:, index].copy_(known)
        return hidden

    def _entry(self, chunk: int, first: RunPart, given: Mapping[RunPart, Tensor]) -> int:
        """The layer from which a chunk is computed: in the first one, that of the last hidden state that is given."""
        if chunk != first.chunk:
            return 0
        known = (one.layer for one in given if one.name == "hidden" and one.chunk == chunk)
        return max(
            (layer for layer in known if layer <= first.layer and layer < self._shape.layers), default=0
        )

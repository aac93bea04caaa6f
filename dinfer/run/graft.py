"""Grafts: another run's block put into this run's ranks, and taken out again."""

from collections.abc import Mapping, Sequence
from functools import partial

import safetensors.torch
from torch import Tensor

from dinfer.cluster.kv import Live
from dinfer.display import DisplayableText, few
from dinfer.errors import excerpt
from dinfer.history import History, call_text
from dinfer.kv.diff import check_alike
from dinfer.messages import WriteBlock
from dinfer.plan.ops import NothingYet, PlanError
from dinfer.plan.partition import within
from dinfer.run.inspect import RunInspector
from dinfer.run.recorder import RunRecorder
from dinfer.run.state import RunState
from dinfer.saved.bisect.search import Bisectable, reference_block

PARTS = {None: slice(0, 2), "K": slice(0, 1), "V": slice(1, 2)}


class Grafts:
    """Of one run, which must stand while these methods run."""

    def __init__(
        self, state: RunState, inspector: RunInspector, recorder: RunRecorder, history: History
    ) -> None:
        self._state, self._inspector, self._recorder, self._history = state, inspector, recorder, history

    def graft(
        self, *, layer: int, chunk: int, source: "str | Bisectable", rank: int | None, part: str | None
    ) -> DisplayableText:
        """See `Run.graft`."""
        plan = self._state.plan
        within("layer", layer, plan.shape.layers)
        within("chunk", chunk, len(plan.shape.chunks))
        if rank is not None:
            within("rank", rank, plan.world_size)
        if part not in PARTS:
            raise PlanError(f"part is {part!r}; it must be 'K' or 'V', or left out for both.")
        live = self._inspector.live()
        ranks = self._holding(live, layer, chunk, range(plan.world_size) if rank is None else [rank])
        given, whose = self._given(live, layer, chunk, source)
        rows = plan.shape.chunks[chunk]
        before = {one: live.values(one, layer, rows) for one in ranks}
        changed = dict[int, int]()
        try:
            for one in ranks:
                changed[one] = self._write(live, one, layer, chunk, part, given)
        finally:  # what has been written can be undone, also if a later rank refuses
            if any(changed.values()):
                named = {"layer": layer, "chunk": chunk, "source": source, "rank": rank, "part": part}
                call = call_text(
                    "graft", (), {name: value for name, value in named.items() if value is not None}
                )
                mine = {one: block for one, block in before.items() if changed.get(one)}
                self._history.add(call, partial(self._restore, layer, chunk, part, mine))
        block, counts = _name(part, chunk, layer), (f"{n} on rank {one}" for one, n in changed.items())
        text = f"{block} is now {whose}; values changed: {', '.join(counts)}."
        if (made := len(self._state.tokens)) and any(changed.values()):
            again = f'run.step_back("token", {made}) and run.decode() make them anew'
            text += f"\n{made} new tokens were made before: {again}."
        return DisplayableText(text)

    def _given(self, live: Live, layer: int, chunk: int, source: "str | Bisectable") -> tuple[Tensor, str]:
        """The block, [tokens, 2, kv_heads, head_dim], and whose it is."""
        rows = self._state.plan.shape.chunks[chunk]
        if isinstance(source, str):
            return reference_block(
                self._recorder.light_record_of(live, 0), source, layer, rows
            ), "the reference's"
        if not isinstance(source, Bisectable):
            raise PlanError(
                f'source is {excerpt(source)}; it must be "reference", or another run, live or saved.'
            )
        other = source.source()
        check_alike(live.subject, other.subject)
        owner = other.subject.plan.shape.owners[layer]
        held = other.held([owner])[0]
        if other.subject.due(held, layer) < rows.stop:
            raise NothingYet(f"{other.subject.name} has not computed block c{chunk} l{layer} yet.")
        name = "the other run's" if isinstance(other, Live) else f"that of {other.subject.name}"
        return other.values(owner, layer, rows), name

    def _holding(self, live: Live, layer: int, chunk: int, asked: Sequence[int]) -> list[int]:
        """Which of these ranks hold the block. Raises NothingYet where none does."""
        held = live.held(asked)
        there = [one for one, spans in zip(asked, held, strict=True) if spans.spans[layer] > chunk]
        if not there:
            raise NothingYet(
                f"no rank holds block c{chunk} l{layer} yet: run.run_to(chunk={chunk}, layer={layer}) first."
                if len(asked) > 1
                else f"rank {asked[0]} does not hold block c{chunk} l{layer} yet: run.run_to(chunk={chunk}, "
                f"layer={layer}) first."
            )
        return there

    def _write(
        self,
        live: Live,
        rank: int,
        layer: int,
        chunk: int,
        part: str | None,
        block: Tensor,
        *,
        undo: bool = False,
    ) -> int:
        """Have a rank write the block, [tokens, 2, kv_heads, head_dim]; how many values changed."""
        data = safetensors.torch.save({"tensor": block[:, PARTS[part]].contiguous().cpu()})
        return live.ask([rank], WriteBlock(chunk, layer, part or "", data, undo))[0].changed

    def _restore(self, layer: int, chunk: int, part: str | None, before: Mapping[int, Tensor]) -> str:
        """Undo a graft."""
        live = self._inspector.live()
        self._holding(live, layer, chunk, list(before))
        name = _name(part, chunk, layer)
        for rank, block in before.items():
            self._write(live, rank, layer, chunk, part, block, undo=True)
            self._state.forget_edited(f"{name} on rank {rank}")
        return f"{name} is what it was on {', '.join(few([f'rank {rank}' for rank in before]))}"


def _name(part: str | None, chunk: int, layer: int) -> str:
    return f"{part or 'K and V'} of block c{chunk} l{layer}"

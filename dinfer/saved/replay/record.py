"""The record of one rank: all that it needs to run again alone, bit for bit, up to where it stood. Runs nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dinfer.config import Config
from dinfer.display import Displayable
from dinfer.engine.prompt import Edit
from dinfer.errors import DinferError
from dinfer.kv.ledger import BlockKey
from dinfer.kv.source import Noted
from dinfer.plan.faults import Fault
from dinfer.plan.ops import Op, PlanError
from dinfer.plan.plan import Plan
from dinfer.results import moved_text


class RecordError(DinferError, RuntimeError):
    """A rank cannot be replayed, or no further: something was not recorded, or is not of this run."""


@dataclass(frozen=True)
class Own:
    """What a rank knows besides its KV. The fields are those of RankRecord."""

    device: str
    tokens: tuple[int, ...]
    begun: tuple[bool, ...]
    final: Tensor | None
    edits: tuple[Edit, ...] = ()
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class RankRecord:
    """One rank of a run.

    `checkpoint`: the fingerprint of the checkpoint; `dtype`, `device`: those that this rank computed in and on; `ids`:
    the prompt's tokens; `tokens`: the new ones. `positions`: by lane, how many ops had ended; `begun`: whether the next
    op had begun, which is then run again if it computes.

    `hidden`: by chunk and layer, the hidden states that this rank received, [1, tokens, hidden_size]; `final`: the
    normed one of the prompt's last token, [1, 1, hidden_size], if another rank computed it. `block(chunk, layer)` gives
    a block that this rank received, [tokens, 2, kv_heads, head_dim], and raises KeyError if it was not recorded.
    `noted`: the rank's ledger, of all blocks. `edits`: what the user had changed here by hand, in order; `faults`:
    those that have struck here; `failure`: how the run failed, "" if it did not.
    """

    name: str
    config: Config
    checkpoint: str
    dtype: str
    device: str
    plan: Plan
    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    rank: int
    positions: tuple[int, ...]
    begun: tuple[bool, ...]
    hidden: Mapping[BlockKey, Tensor]
    final: Tensor | None
    block: Callable[[int, int], Tensor]
    noted: Mapping[BlockKey, Noted]
    edits: tuple[Edit, ...] = ()
    faults: tuple[Fault, ...] = ()
    failure: str = ""

    @property
    def reach(self) -> tuple[int, ...]:
        """By lane, how far a replay may go: to where the rank stood, and through an op that computes and had begun."""
        lanes = self.plan.lanes[self.rank]
        return tuple(
            at + (begun and at < len(lane.ops) and not lane.ops[at].is_transfer)
            for lane, at, begun in zip(lanes, self.positions, self.begun, strict=True)
        )

    @property
    def faults_again(self) -> tuple[Fault, ...]:
        """The faults that must strike again. What faults did to received blocks is in the record of these blocks."""
        owners = self.plan.shape.owners
        return tuple(
            fault
            for fault in self.faults
            if fault.kind == "repeat_row"
            or (fault.kind != "append_twice" and owners[fault.layer] == self.rank)
        )

    def payload(self, op: Op) -> Tensor:
        """What this recv has received. Raises RecordError if it was not recorded."""
        found: Tensor | None = None
        if op.what == "hidden":
            found = self.hidden.get((op.chunk, op.layer))
        elif op.what == "final":
            found = self.final
        else:
            try:
                found = self.block(op.chunk, op.layer)
            except KeyError:
                found = None
        if found is None:
            raise RecordError(
                f"{op.value} was not recorded on rank {self.rank}: the replay cannot go on at `{op}`."
            )
        return found


def check_rank(rank: int, plan: Plan) -> None:
    """Raises PlanError for an unknown rank."""
    if not 0 <= rank < plan.world_size:
        raise PlanError(f"rank is {rank}; the ranks of this run are 0 to {plan.world_size - 1}.")


def check_states(recorded: RankRecord) -> None:
    """Raises RecordError if a hidden state that this rank received is missing, or has another dtype."""
    received = entered(recorded.plan, recorded.rank, recorded.positions)
    missing = [op for op in received if (op.what == "final" and recorded.final is None)]
    missing += [op for op in received if op.what == "hidden" and (op.chunk, op.layer) not in recorded.hidden]
    if missing:
        few = ", ".join(str(op.value) for op in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise RecordError(
            f"some of what rank {recorded.rank} received was not recorded: {few}{more}. Save the run with "
            "hidden=True, or replay it while its ranks still hold them."
        )
    states = [*recorded.hidden.values(), *([] if recorded.final is None else [recorded.final])]
    if wrong := {one.dtype for one in states} - {getattr(torch, recorded.dtype)}:
        raise RecordError(
            f"the hidden states of rank {recorded.rank} were recorded in {_name(wrong.pop())}, but the run's dtype is "
            f"{recorded.dtype}: they are not of this run."
        )


def entered(plan: Plan, rank: int, positions: tuple[int, ...]) -> list[Op]:
    """The recvs of hidden states that have ended on a rank at these positions."""
    return [op for op in _received(plan, rank, positions) if op.what != "kv"]


def arrived(plan: Plan, rank: int, positions: tuple[int, ...]) -> list[Op]:
    """The recvs of blocks that have ended there."""
    return [op for op in _received(plan, rank, positions) if op.what == "kv"]


def _received(plan: Plan, rank: int, positions: tuple[int, ...]) -> list[Op]:
    lanes = zip(plan.lanes[rank], positions, strict=True)
    return [op for lane, at in lanes for op in lane.ops[:at] if op.kind == "recv"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SHOWN = 12
"""up to so many ops are listed one by one"""


@dataclass(frozen=True, repr=False)
class Went(Displayable):
    """What one call did: the positions before and after, by lane, and in words."""

    rank: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    lines: tuple[str, ...]
    remark: str = ""
    edited: tuple[str, ...] = ()

    @property
    def moved(self) -> bool:
        return self.before != self.after

    def __str__(self) -> str:
        return moved_text(self.lines if self.moved else (), self.remark, self.edited)


def ended_text(recorded: RankRecord) -> str:
    """Where the rank stood, so that nothing more can be replayed."""
    lanes = zip(recorded.plan.lanes[recorded.rank], recorded.positions, recorded.begun, strict=True)
    ahead = [(lane.ops[at], begun) for lane, at, begun in lanes if at < len(lane.ops)]
    if not ahead:
        return "the record ends here: the rank had ended prefill"
    stood = [f"in `{op}`" for op, begun in ahead if begun] or [f"before `{ahead[0][0]}`"]
    failed = f"; the run failed: {recorded.failure.partition(chr(10))[0]}" if recorded.failure else ""
    return f"the record ends here: rank {recorded.rank} stood {' and '.join(stood)}{failed}"


def late_edits(recorded: RankRecord) -> list[str]:
    """Notes on hidden states that were edited after their layer had run: their first values are not recorded, so the
    replay of that layer differs."""
    found = []
    for edit in recorded.edits:
        lanes = zip(recorded.plan.lanes[recorded.rank], edit.positions, strict=True)
        used = {(op.chunk, op.layer) for lane, at in lanes for op in lane.ops[:at] if op.kind == "layer"}
        found += [
            f"hidden c{chunk} l{layer} was edited by hand after `layer c{chunk} l{layer}` had computed with it, and "
            "what it was before is not recorded"
            for chunk, layer in edit.hidden
            if (chunk, layer) in recorded.hidden and (chunk, layer) in used
        ]
    return found


def left_out(recorded: RankRecord) -> list[str]:
    """Notes on faults that cannot be repeated."""
    return [
        f"a fault of the run that is not repeated here: {one}"
        for one in recorded.faults
        if one.kind == "append_twice"
    ]


def differs_text(op: Op) -> str:
    """A note on a block whose bytes are not those in the rank's ledger of the run."""
    block = f"block c{op.chunk} l{op.layer}"
    if op.kind == "layer":
        return (
            f"{block} has other bytes here than in the run (another machine, version of torch, device or "
            "number of threads, other weights, or a fault that was armed there)"
        )
    return f"{block} as it was recorded is not what rank {op.peer} had sent: it has changed since"

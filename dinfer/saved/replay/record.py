"""Recorded: all that one rank needs to run again alone, bit for bit, up to where it stood. Nothing here runs."""

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
    """A rank cannot be replayed, or not from there on: what was recorded does not do, or does not fit."""


@dataclass(frozen=True)
class Own:
    """What a rank knows of its own doings, beside what it holds. The fields are those of Recorded."""

    device: str
    tokens: tuple[int, ...]
    begun: tuple[bool, ...]
    final: Tensor | None
    edits: tuple[Edit, ...] = ()
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class RankRecord:
    """One rank of a run.

    `checkpoint`: the fingerprint of what `config.model_path` held; `dtype`, `device`: what this rank computed in, and
    where; `ids`: the prompt; `tokens`: the new ones. `positions`: where the rank's lanes stood, by lane; `begun`:
    whether the next op of each had begun, which is run again if it is one that computes.

    `hidden`: by chunk and layer, the states that entered this rank, [1, tokens, hidden_size]; `final`: the normed one
    of the prompt's last token, [1, 1, hidden_size], if another rank made it. `block(chunk, layer)`, [tokens, 2,
    kv_heads, head_dim], gives blocks that came from other ranks, and raises KeyError for one that was not recorded.
    `noted`: what this rank's ledger said of blocks, also its own. `edits`: what the user had changed here by hand, in
    order; `faults`: those that were armed and have struck here; `failure`: how the run failed, if it did.
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
        """How far a replay may go, by lane: to where the rank stood, and through an op that computes and had begun."""
        lanes = self.plan.lanes[self.rank]
        return tuple(
            at + (begun and at < len(lane.ops) and not lane.ops[at].is_transfer)
            for lane, at, begun in zip(lanes, self.positions, self.begun, strict=True)
        )

    @property
    def faults_again(self) -> tuple[Fault, ...]:
        """Those that must strike again: what they have done to blocks that came is in what was recorded of them."""
        owners = self.plan.shape.owners
        return tuple(
            fault
            for fault in self.faults
            if fault.kind == "repeat_row"
            or (fault.kind != "append_twice" and owners[fault.layer] == self.rank)
        )

    def payload(self, op: Op) -> Tensor:
        """What came in this recv. Raises RecordError where that was not recorded."""
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
    """Raises PlanError for a rank that there is not."""
    if not 0 <= rank < plan.world_size:
        raise PlanError(f"rank is {rank}; the ranks of this run are 0 to {plan.world_size - 1}.")


def check_states(recorded: RankRecord) -> None:
    """Raises RecordError where a hidden state that entered this rank is missing, or one has another dtype."""
    came = entered(recorded.plan, recorded.rank, recorded.positions)
    missing = [op for op in came if (op.what == "final" and recorded.final is None)]
    missing += [op for op in came if op.what == "hidden" and (op.chunk, op.layer) not in recorded.hidden]
    if missing:
        few = ", ".join(str(op.value) for op in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise RecordError(
            f"what entered rank {recorded.rank} was not recorded: {few}{more}. Record the hidden states too, or replay "
            "the run while its ranks still hold them."
        )
    states = [*recorded.hidden.values(), *([] if recorded.final is None else [recorded.final])]
    if wrong := {one.dtype for one in states} - {getattr(torch, recorded.dtype)}:
        raise RecordError(
            f"the hidden states of rank {recorded.rank} were recorded in {_name(wrong.pop())}, but the run's dtype is "
            f"{recorded.dtype}: they are not of this run."
        )


def entered(plan: Plan, rank: int, positions: tuple[int, ...]) -> list[Op]:
    """The recvs of states, hidden or final, that have ended on a rank that stands there."""
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
"""ops that are told one by one"""


@dataclass(frozen=True, repr=False)
class Went(Displayable):
    """What one call did: positions before and after, by lane, and that in words."""

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
    """Where the rank stood, and why nothing more can be replayed."""
    lanes = zip(recorded.plan.lanes[recorded.rank], recorded.positions, recorded.begun, strict=True)
    ahead = [(lane.ops[at], begun) for lane, at, begun in lanes if at < len(lane.ops)]
    if not ahead:
        return "the record ends here: the rank had ended prefill"
    stood = [f"in `{op}`" for op, begun in ahead if begun] or [f"before `{ahead[0][0]}`"]
    failed = f"; the run failed: {recorded.failure.partition(chr(10))[0]}" if recorded.failure else ""
    return f"the record ends here: rank {recorded.rank} stood {' and '.join(stood)}{failed}"


def late_edits(recorded: RankRecord) -> list[str]:
    """Of hidden states that entered the rank and were edited once its layer had computed with them: what they had been
    is nowhere, so what was made of them before comes out otherwise."""
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
    """Of faults that cannot be repeated."""
    return [f"in the run, and not here: fault {one}" for one in recorded.faults if one.kind == "append_twice"]


def differs_text(op: Op) -> str:
    """Of a block whose bytes are not those that the rank's ledger told of in the run."""
    block = f"block c{op.chunk} l{op.layer}"
    if op.kind == "layer":
        return (
            f"{block} comes out here with other bytes than in the run (another machine, version of torch, device or "
            "number of threads, other weights, or a fault that was armed there)"
        )
    return f"{block} as it was recorded is not what had come from rank {op.peer}: it has changed since"

"""The record of one rank: all that it needs to run again alone, bit for bit, up to where it stood. Runs nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dinfer.config import Config
from dinfer.engine.prompt import Edit
from dinfer.errors import DinferError
from dinfer.kv.ledger import BlockKey
from dinfer.kv.source import Noted, Source
from dinfer.plan.faults import Fault
from dinfer.plan.ops import Op, PlanError
from dinfer.plan.plan import Plan


class RecordError(DinferError, RuntimeError):
    """A rank cannot be replayed, or no further: something was not recorded, or is not of this run."""


@dataclass(frozen=True, kw_only=True)
class Own:
    """What only a rank itself knows, besides its KV. `device`: the one that it computed on; `tokens`: the new ones;
    `begun`: by lane, whether the next op had begun, which is then run again if it computes; `final`: the normed hidden
    state of the prompt's last token, [1, 1, hidden_size], if another rank computed it; `edits`: what the user had
    changed here by hand, in order; `faults`: those that have struck here."""

    device: str
    tokens: tuple[int, ...]
    begun: tuple[bool, ...]
    final: Tensor | None
    edits: tuple[Edit, ...] = ()
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RankRecord(Own):
    """One rank of a run. `checkpoint`: the fingerprint of the checkpoint; `dtype`: the one that it computed in; `ids`:
    the prompt's tokens; `positions`: by lane, how many ops had ended; `failure`: how the run failed, "" if it did not.

    `hidden`: by chunk and layer, the hidden states that this rank received, [1, tokens, hidden_size]; `block(chunk,
    layer)`: a block that it received, [tokens, 2, kv_heads, head_dim], None if it was not recorded; `noted`: its
    ledger, of all blocks.
    """

    name: str
    config: Config
    checkpoint: str
    dtype: str
    plan: Plan
    ids: tuple[int, ...]
    rank: int
    positions: tuple[int, ...]
    hidden: Mapping[BlockKey, Tensor]
    block: Callable[[int, int], Tensor | None]
    noted: Mapping[BlockKey, Noted]
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
        if op.what == "final":
            found = self.final
        else:
            found = (
                self.hidden.get((op.chunk, op.layer))
                if op.what == "hidden"
                else self.block(op.chunk, op.layer)
            )
        if found is None:
            raise RecordError(
                f"{op.value} was not recorded on rank {self.rank}: the replay cannot go on at `{op}`."
            )
        return found


def record_of(
    source: Source,
    rank: int,
    own: Own,
    *,
    config: Config,
    positions: tuple[int, ...],
    hidden: Callable[[int, int], Tensor | None],
    block: Callable[[int, int], Tensor | None],
    failure: str,
) -> RankRecord:
    """The record of a rank of that source. `hidden(chunk, layer)`: what entered it, [tokens, hidden_size], None if that
    is not known; the others are as in RankRecord."""
    subject = source.subject
    received = [op for op in received_by(subject.plan, rank, positions) if op.what == "hidden"]
    states = {(op.chunk, op.layer): hidden(op.chunk, op.layer) for op in received}
    return RankRecord(
        **vars(own),
        name=subject.name,
        config=config,
        checkpoint=subject.checkpoint,
        dtype=subject.dtype_name,
        plan=subject.plan,
        ids=subject.prompt,
        rank=rank,
        positions=positions,
        hidden={key: state[None] for key, state in states.items() if state is not None},
        block=block,
        noted=source.noted([rank], range(subject.plan.shape.layers))[0],
        failure=failure,
    )


def check_rank(rank: int, plan: Plan) -> None:
    """Raises PlanError for an unknown rank."""
    if not 0 <= rank < plan.world_size:
        raise PlanError(f"rank is {rank}; the ranks of this run are 0 to {plan.world_size - 1}.")


def check_states(recorded: RankRecord) -> None:
    """Raises RecordError if a hidden state that this rank received is missing, or has another dtype."""
    received = received_by(recorded.plan, recorded.rank, recorded.positions)
    missing = [op for op in received if op.what == "final" and recorded.final is None]
    missing += [op for op in received if op.what == "hidden" and (op.chunk, op.layer) not in recorded.hidden]
    if missing:
        few = ", ".join(str(op.value) for op in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise RecordError(
            f"some of what rank {recorded.rank} received was not recorded: {few}{more}. Save the run with "
            "hidden=True, or replay it while its ranks still hold them."
        )
    states = [*recorded.hidden.values(), *([] if recorded.final is None else [recorded.final])]
    if wrong := {str(one.dtype).removeprefix("torch.") for one in states} - {recorded.dtype}:
        raise RecordError(
            f"the hidden states of rank {recorded.rank} were recorded in {wrong.pop()}, but the run's dtype is "
            f"{recorded.dtype}: they are not of this run."
        )


def received_by(plan: Plan, rank: int, positions: tuple[int, ...]) -> list[Op]:
    """The recvs that have ended on a rank at these positions."""
    lanes = zip(plan.lanes[rank], positions, strict=True)
    return [op for lane, at in lanes for op in lane.ops[:at] if op.kind == "recv"]


def not_repeated(recorded: RankRecord) -> list[str]:
    """Notes on what a replay cannot repeat: faults, and hidden states that were edited after their layer had run, whose
    first values are not recorded."""
    found = list[str]()
    for edit in recorded.edits:
        lanes = zip(recorded.plan.lanes[recorded.rank], edit.positions, strict=True)
        used = {(op.chunk, op.layer) for lane, at in lanes for op in lane.ops[:at] if op.kind == "layer"}
        found += [
            f"hidden c{chunk} l{layer} was edited by hand after `layer c{chunk} l{layer}` had computed with it, and "
            "what it was before is not recorded"
            for chunk, layer in edit.hidden
            if (chunk, layer) in recorded.hidden and (chunk, layer) in used
        ]
    twice = [one for one in recorded.faults if one.kind == "append_twice"]
    return [*found, *(f"a fault of the run that is not repeated here: {one}" for one in twice)]

"""The record of one rank: all that it needs to run again alone, bit for bit, up to where it stood. Runs nothing."""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

from torch import Tensor

from dinfer.config import Config
from dinfer.engine.prompt import Edit
from dinfer.errors import DinferError, excerpt
from dinfer.kv.ledger import BlockKey
from dinfer.kv.source import Noted, Source
from dinfer.plan.cut import Cuts, Unit
from dinfer.plan.faults import Fault
from dinfer.plan.ops import Op, PlanError, Value
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
    def end_text(self) -> str:
        """Where the rank stood, so that nothing more can be replayed."""
        lanes = zip(self.plan.lanes[self.rank], self.positions, self.begun, strict=True)
        ahead = [(lane.ops[at], begun) for lane, at, begun in lanes if at < len(lane.ops)]
        if not ahead:
            return "the record ends here: the rank had ended prefill"
        stood = [f"in `{op}`" for op, begun in ahead if begun] or [f"before `{ahead[0][0]}`"]
        failed = f"; the run failed: {self.failure.partition(chr(10))[0]}" if self.failure else ""
        return f"the record ends here: rank {self.rank} stood {' and '.join(stood)}{failed}"

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
        **vars(own), name=subject.name, config=config, checkpoint=subject.checkpoint, dtype=subject.dtype_name,
        plan=subject.plan, ids=subject.prompt, rank=rank, positions=positions,
        hidden={key: state[None] for key, state in states.items() if state is not None}, block=block,
        noted=source.noted([rank], range(subject.plan.shape.layers))[0], failure=failure,
    )  # fmt: skip


def check_rank(rank: int, plan: Plan) -> None:
    """Raises PlanError for an unknown rank."""
    if not isinstance(rank, Integral) or not 0 <= rank < plan.world_size:
        raise PlanError(f"rank is {excerpt(rank)}; the ranks of this run are 0 to {plan.world_size - 1}.")


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


# -- the positions through which a replay steps: those that the steps of the whole run gave the rank, as far as recorded


LanePositions = tuple[int, ...]
"""how many ops of each lane of one rank have ended"""


def is_inside(one: LanePositions, other: LanePositions) -> bool:
    """Whether no lane of `one` is further than in `other`."""
    return all(a <= b for a, b in zip(one, other, strict=True))


def lower(one: LanePositions, other: LanePositions) -> LanePositions:
    return tuple(map(min, one, other))


def upper(one: LanePositions, other: LanePositions) -> LanePositions:
    return tuple(map(max, one, other))


class ReplayPath:
    """The steps of one rank, from its start to `reach`."""

    def __init__(self, plan: Plan, rank: int, reach: LanePositions) -> None:
        self.plan, self.rank, self.reach = plan, rank, reach
        self.start: LanePositions = tuple(0 for _ in reach)
        self._chains: dict[Unit, list[LanePositions]] = {}

    def next(self, at: LanePositions, unit: Unit) -> LanePositions:
        """The positions one step on; `at` itself at the end."""
        chain = self.chain(unit)
        ahead = bisect_left(chain, True, key=lambda link: not is_inside(link, at))
        return upper(at, chain[ahead]) if ahead < len(chain) else at

    def previous(self, at: LanePositions, unit: Unit) -> LanePositions:
        """`at` without the last step that it has anything of; `at` itself at the start."""
        chain = self.chain(unit)
        begun = bisect_left(chain, True, key=lambda link: is_inside(at, link))
        return lower(at, chain[begun - 1]) if begun else at

    def after_block(self, chunk: int, layer: int) -> LanePositions:
        """The positions once that block is on every rank, or where the record ends. Raises PlanError for an unknown
        block."""
        return lower(self._cuts.after_block(chunk, layer)[self.rank], self.reach)

    def chain(self, unit: Unit) -> list[LanePositions]:
        """All positions of that unit's steps, from start to reach."""
        if unit not in self._chains:
            links = self._single() if unit == "op" else [cut[self.rank] for cut in self._cuts.chain(unit)]
            clipped = [lower(link, self.reach) for link in links]
            self._chains[unit] = list(dict.fromkeys([self.start, *clipped, self.reach]))
        return self._chains[unit]

    @cached_property
    def _cuts(self) -> Cuts:
        try:
            return Cuts(self.plan)
        except PlanError:
            raise PlanError(
                "this plan was refuted, so it has no cuts to stop at: step by op, or resume()."
            ) from None

    def _single(self) -> list[LanePositions]:
        """One op after another, in an order in which this rank could run them: what other lanes need comes first."""
        lanes, at, made = self.plan.lanes[self.rank], list(self.start), set[Value]()
        links = [self.start]
        while tuple(at) != self.reach:
            ready = [
                (lane.ops[at[n]].chunk, lane.ops[at[n]].layer, n)
                for n, lane in enumerate(lanes)
                if at[n] < self.reach[n] and made.issuperset(lane.ops[at[n]].needs())
            ]
            if not ready:
                raise PlanError(
                    f"rank {self.rank} cannot have come to {self.reach}: the record is not of this plan."
                )
            lane = min(ready)[2]
            made.update(lanes[lane].ops[at[lane]].makes())
            at[lane] += 1
            links.append(tuple(at))
        return links

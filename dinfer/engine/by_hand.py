"""One rank under its user's hand, in a `%%px` cell: step it, see what it holds.

Every rank goes to the same next cut if all make the same call. One that steps alone does what it can and says, past its
deadline, whom it waits for; called again once the others have moved, it goes on from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dinfer.engine.board import Stand
from dinfer.engine.conditions import made_by
from dinfer.engine.lanes import LaneExecutor
from dinfer.engine.prefill import Prefill
from dinfer.kv.digests import statistics
from dinfer.plan.cut import Unit
from dinfer.plan.ops import Op
from dinfer.plan.partition import within
from dinfer.plan.plan import Plan
from dinfer.verdict.words import at_text, waits_for_text


@dataclass(frozen=True)
class Steps:
    """What one call of `engine.step` did on one rank: `lines`, one an op; `waits`: for whom, if it is not through."""

    rank: int
    unit: Unit
    lines: tuple[str, ...]
    waits: str = ""
    edited: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        head = f"rank {self.rank}: {self.waits}" if not self.waits.startswith("rank") else self.waits
        if not self.waits:
            head = f"rank {self.rank}: one {self.unit}, {len(self.lines)} ops"
        edited = [f"  edited by hand: {', '.join(self.edited)}"] if self.edited else []
        return "\n".join([head, *(f"  {line}" for line in self.lines), *edited])


@dataclass(frozen=True)
class LayerKV:
    """K and V of one layer on one rank, views of the cache: writing to them changes the cache.

    `k` and `v` are [kv_heads, tokens, head_dim]; `chunks` are those that are here, in order from chunk 0, and `tokens`
    is how many tokens they hold.
    """

    rank: int
    layer: int
    chunks: tuple[int, ...]
    k: Tensor
    v: Tensor

    @property
    def tokens(self) -> int:
        return self.k.shape[1]

    def __repr__(self) -> str:
        head = f"layer {self.layer} on rank {self.rank}: {self.tokens} tokens, chunks {list(self.chunks)}"
        if not self.tokens:
            return f"{head} (nothing computed or received yet)"
        return f"{head}\n  K {statistics(self.k)}\n  V {statistics(self.v)}"


def ops_between(executor: LaneExecutor, before: tuple[int, ...], after: tuple[int, ...]) -> list[Op]:
    """The rank's ops between two positions, lane by lane."""
    lanes = executor.plan.lanes[executor.rank]
    return [op for lane, one, other in zip(lanes, before, after, strict=True) for op in lane.ops[one:other]]


def op_lines(state: Prefill, ops: list[Op]) -> tuple[str, ...]:
    """Each op, with shape and statistics of what it has left here."""
    lines = []
    for op in ops:
        made = "; ".join(f"{name} {statistics(tensor)}" for name, tensor in made_by(state, op))
        lines.append(f"{op}   {made}" if made else str(op))
    return tuple(lines)


def layer_kv(executor: LaneExecutor, layer: int) -> LayerKV:
    """What the rank holds of a layer: the chunks that are here without a gap. Raises PlanError for no such layer."""
    state, shape = executor.state, executor.plan.shape
    within("layer", layer, shape.layers)
    chunks = list[int]()
    for chunk in range(len(shape.chunks)):
        if not executor.holds_block(chunk, layer):
            break
        chunks.append(chunk)
    stop = shape.chunks[chunks[-1]].stop if chunks else 0
    rows = state.cache.block(layer, 0, stop)
    return LayerKV(
        executor.rank, layer, tuple(chunks), rows[:, 0].transpose(0, 1), rows[:, 1].transpose(0, 1)
    )


def waits_text(plan: Plan, rank: int, stands: Sequence[Stand | None]) -> str:
    """For example `rank 1 waits for hidden c0 before layer 2 from rank 0, which stands at c0 l1`."""
    mine = stands[rank]
    if mine is None:
        return f"rank {rank} has not said where it stands"
    open_ops = [
        (lane.ops[position], started)
        for lane, position, started, limit in zip(
            plan.lanes[rank], mine.positions, mine.started, mine.limits, strict=True
        )
        if position < min(limit, len(lane.ops))
    ]
    if not open_ops:
        return f"rank {rank} stands {at_text(plan.lanes[rank], mine.positions)}"
    op, started = min(open_ops, key=_urgency)
    return f"rank {rank} {_waits_for(plan, op, stands) if started and op.is_transfer else _busy(op, started)}"


def _urgency(pair: tuple[Op, bool]) -> tuple[bool, bool, bool]:
    """What holds up the most comes first: a transfer under way, of a hidden state, to be received."""
    op, started = pair
    return (not (started and op.is_transfer), op.what == "kv", op.kind != "recv")


def _waits_for(plan: Plan, op: Op, stands: Sequence[Stand | None]) -> str:
    peer = stands[op.peer]
    there = at_text(plan.lanes[op.peer], peer.positions if peer else None)
    return f"{waits_for_text(op)}, which stands {there}"


def _busy(op: Op, started: bool) -> str:
    return f"is in `{op}`" if started else f"has what it needs for all but `{op}`"

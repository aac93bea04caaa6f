"""Results of `engine.step` and `engine.kv`, for one rank that its user steps from a `%%px` cell.

If all ranks make the same call, all go to the same next cut. A rank that steps alone runs the ops that it can and names
the rank that it waits for; the next call continues from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from dinfer.engine.board import Stand
from dinfer.engine.lanes import LaneExecutor
from dinfer.engine.prefill import Prefill
from dinfer.kv.digests import statistics
from dinfer.plan.cut import Unit
from dinfer.plan.ops import Op
from dinfer.plan.partition import within
from dinfer.plan.plan import Plan
from dinfer.verdict.where import at_text, waits_for_text


@dataclass(frozen=True)
class Steps:
    """What one `engine.step` did on one rank.

    `lines`: one for each op that ended; `blocked_on`: which rank it waits for, empty if it ended; `edited`: by hand.
    """

    rank: int
    unit: Unit
    lines: tuple[str, ...]
    blocked_on: str = ""
    edited: tuple[str, ...] = ()

    def __repr__(self) -> str:
        count = len(self.lines)
        head = self.blocked_on or f"one {self.unit}, {count} op{'s' * (count != 1)}"
        if not head.startswith("rank"):
            head = f"rank {self.rank}: {head}"
        edited = [f"  edited by hand: {', '.join(self.edited)}"] if self.edited else []
        return "\n".join([head, *(f"  {line}" for line in self.lines), *edited])


@dataclass(frozen=True)
class LayerKV:
    """K and V of one layer on one rank, as views: writing to them edits the cache.

    `k` and `v` are [kv_heads, tokens, head_dim]; `chunks` are those that the rank holds, from chunk 0 without a gap.
    """

    rank: int
    layer: int
    chunks: tuple[int, ...]
    k: Tensor
    v: Tensor

    @property
    def tokens(self) -> int:
        """How many tokens the chunks hold."""
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
    """One line an op, with shape and statistics of the tensors that it made here."""
    made = ("; ".join(f"{name} {statistics(one)}" for name, one in state.made_by(op)) for op in ops)
    return tuple(f"{op}   {text}".rstrip() for op, text in zip(ops, made, strict=True))


def layer_kv(executor: LaneExecutor, layer: int) -> LayerKV:
    """K and V of a layer's chunks on this rank, from chunk 0 to the first gap. Raises PlanError for no layer."""
    shape = executor.plan.shape
    within("layer", layer, shape.layers)
    numbers = range(len(shape.chunks))
    chunks = tuple(takewhile(lambda chunk: executor.holds_block(chunk, layer), numbers))
    stop = shape.chunks[chunks[-1]].stop if chunks else 0
    rows = executor.state.cache.block(layer, 0, stop)
    return LayerKV(executor.rank, layer, chunks, rows[:, 0].transpose(0, 1), rows[:, 1].transpose(0, 1))


def blocked_on_text(plan: Plan, rank: int, stands: Sequence[Stand | None]) -> str:
    """For example `rank 1 waits for hidden c0 before layer 2 from rank 0, which stands at c0 l1`.

    `stands`: where each rank stands, by rank, None where unknown.
    """
    mine, lanes = stands[rank], plan.lanes[rank]
    if mine is None:
        return f"rank {rank}: position unknown"
    progress = zip(lanes, mine.positions, mine.started, mine.limits, strict=True)
    open_ops = [
        (lane.ops[position], started)
        for lane, position, started, limit in progress
        if position < min(limit, len(lane.ops))
    ]
    if not open_ops:
        return f"rank {rank} stands {at_text(lanes, mine.positions)}"
    # What blocks most: a transfer under way, of a hidden state, to be received.
    op, started = min(
        open_ops,
        key=lambda one: (not (one[1] and one[0].is_transfer), one[0].what == "kv", one[0].kind != "recv"),
    )
    if not started:
        return f"rank {rank} cannot start `{op}` yet"
    if not op.is_transfer:
        return f"rank {rank} is in `{op}`"
    peer = stands[op.peer]
    there = at_text(plan.lanes[op.peer], peer.positions if peer else None)
    return f"rank {rank} {waits_for_text(op)}, which stands {there}"

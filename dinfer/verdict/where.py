"""Where ranks stand, in words. Pure: plan and stands in, text out."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Protocol

from dinfer.plan.cut import Cut
from dinfer.plan.ops import Op
from dinfer.plan.plan import Lane, Plan
from dinfer.verdict.words import at_text


class RankStand(Protocol):
    """Where one rank stands, by lane: what texts and views need of `dinfer.engine.board.Stand`."""

    @property
    def positions(self) -> Sequence[int]:
        """How many ops have ended."""

    @property
    def started(self) -> Sequence[bool]:
        """Whether the next op has begun."""

    @property
    def limits(self) -> Sequence[int]:
        """How many ops may run."""


def where_text(plan: Plan, stands: Sequence[RankStand]) -> str:
    """A line for each rank: how much of it is done, and the op at which each unfinished lane stands."""
    return "\n".join(
        f"rank {rank}: {rank_text(plan.lanes[rank], stand)}" for rank, stand in enumerate(stands)
    )


def rank_text(lanes: Sequence[Lane], stand: RankStand) -> str:
    """One rank's line of that."""
    done, total = sum(stand.positions), sum(len(lane.ops) for lane in lanes)
    if done == total:
        return f"all {total} ops done"
    if tuple(stand.positions) == tuple(stand.limits) and not any(stand.started):
        return f"{done} of {total} ops done; stands {at_text(lanes, stand.positions)}, next {_next_text(lanes, stand)}"
    open_lanes = [
        _lane_text(lane, stand, n) for n, lane in enumerate(lanes) if stand.positions[n] < len(lane.ops)
    ]
    return f"{done} of {total} ops done; " + "; ".join(open_lanes)


def _next_text(lanes: Sequence[Lane], stand: RankStand) -> str:
    """The next op that computes, or else the next op of the first lane that has one."""
    ahead = [lane.ops[at] for lane, at in zip(lanes, stand.positions, strict=True) if at < len(lane.ops)]
    return f"`{min(ahead, key=lambda op: op.is_transfer)}`"


def _lane_text(lane: Lane, stand: RankStand, number: int) -> str:
    position = stand.positions[number]
    state = (
        "in" if stand.started[number] else "before" if stand.limits[number] > position else "stopped before"
    )
    return f"{lane.name} {state} `{lane.ops[position]}`"


def moved_lines(plan: Plan, before: Cut, after: Cut) -> list[str]:
    """What each rank did between two cuts, or undid, a line each."""
    return [
        f"rank {rank}: {_moved(plan.lanes[rank], before[rank], after[rank])}" for rank in range(len(before))
    ]


def _moved(lanes: Sequence[Lane], before: Sequence[int], after: Sequence[int]) -> str:
    ahead = [op for lane, a, b in zip(lanes, before, after, strict=True) for op in lane.ops[a:b]]
    undone = [op for lane, a, b in zip(lanes, before, after, strict=True) for op in lane.ops[b:a]]
    texts = [_ops_text(ahead)] * bool(ahead) + [f"undid {_ops_text(undone)}"] * bool(undone)
    return "; ".join(texts) or "nothing"


def _ops_text(ops: Sequence[Op]) -> str:
    layers = [f"c{op.chunk} l{op.layer}" for op in ops if op.kind == "layer"]
    ends = [op for op in ops if op.kind in ("embed", "norm")] if len(ops) < 12 else []
    parts = [f"{op}" for op in ends if op.kind == "embed"]
    parts += [f"computed {_few(layers)}"] * bool(layers)
    parts += [f"{op}" for op in ends if op.kind == "norm"]
    for verb, kind, arrow in (("sent", "send", "to"), ("received", "recv", "from")):
        transfers = sorted((op for op in ops if op.kind == kind), key=lambda op: op.peer)
        for peer, same in groupby(transfers, key=lambda op: op.peer):
            parts.append(f"{verb} {_few(str(op.value) for op in same)} {arrow} {peer}")
    return ", ".join(parts)


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed) if len(listed) <= 3 else f"{listed[0]} … {listed[-1]} ({len(listed)})"

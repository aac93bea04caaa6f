"""Where ranks stand, in words. Pure: plan and stands in, text out."""

from collections.abc import Sequence
from typing import Protocol

from dinfer.plan.plan import Lane, Plan


class Stand(Protocol):
    """Where one rank stands, by lane; `dinfer.engine.board.Stand` is one. Views know it by this."""

    @property
    def positions(self) -> Sequence[int]:
        """Ops that have ended."""

    @property
    def started(self) -> Sequence[bool]:
        """Whether the next has begun."""

    @property
    def limits(self) -> Sequence[int]:
        """How far it may go."""


def where_text(plan: Plan, stands: Sequence[Stand]) -> str:
    """A line for each rank: how much of it is done, and the op at which each unfinished lane stands."""
    return "\n".join(
        f"rank {rank}: {rank_text(plan.lanes[rank], stand)}" for rank, stand in enumerate(stands)
    )


def rank_text(lanes: Sequence[Lane], stand: Stand) -> str:
    done, total = sum(stand.positions), sum(len(lane.ops) for lane in lanes)
    if done == total:
        return f"all {total} ops done"
    open_lanes = [
        _lane_text(lane, stand, n) for n, lane in enumerate(lanes) if stand.positions[n] < len(lane.ops)
    ]
    return f"{done} of {total} ops done; " + "; ".join(open_lanes)


def _lane_text(lane: Lane, stand: Stand, number: int) -> str:
    position = stand.positions[number]
    state = (
        "in" if stand.started[number] else "before" if stand.limits[number] > position else "stopped before"
    )
    return f"{lane.name} {state} `{lane.ops[position]}`"

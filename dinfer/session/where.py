"""Where ranks stand, in words. Pure: plan and stands in, text out."""

from collections.abc import Sequence

from dinfer.engine.board import Stand
from dinfer.plan.plan import Lane, Plan


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

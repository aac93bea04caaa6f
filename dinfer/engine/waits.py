"""What one rank waits for, in words, from where the ranks stand. Pure."""

from collections.abc import Sequence

from dinfer.engine.board import Stand
from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan
from dinfer.verdict.words import at_text, waits_for_text


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

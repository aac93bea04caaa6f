"""Events of a plan's ops. Beside events, which presume no plan."""

from dinfer.plan.ops import Op
from dinfer.trace.events import Event


def event_of(
    op: Op, rank: int, lane: str, index: int, times: tuple[int, int, int, int], nbytes: int
) -> Event:
    """What an op that has ended leaves. `times`: ready, start, met and end, as in Event; `index`: its place on the
    lane."""
    ready, start, met, end = times
    return Event(
        rank=rank,
        lane=lane,
        kind=op.kind,
        ready=ready,
        start=start,
        met=met,
        end=end,
        what=op.what if op.is_transfer else "",
        chunk=None if op.chunk < 0 else op.chunk,
        layer=None if op.layer < 0 else op.layer,
        peer=op.peer if op.is_transfer else None,
        tokens=op.tokens,
        bytes=nbytes,
        index=index,
    )

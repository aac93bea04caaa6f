"""Pauses: when a run stood because someone had stopped it; and a trace as if nobody had. Pure."""

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

from dinfer.trace.events import Event
from dinfer.trace.intervals import Interval, minus, union
from dinfer.trace.trace import Trace

SHORTEST = 10_000_000
"""nanoseconds without an op on any rank from which on it counts as a pause"""


def pauses(trace: Trace) -> list[Interval]:
    """When no rank had an op to do: none was allowed to begin."""
    busy = union((event.ready, event.end) for event in trace.events)
    if not busy:
        return []
    gaps = minus([(busy[0][0], busy[-1][1])], busy)
    return [gap for gap in gaps if gap[1] - gap[0] >= SHORTEST]


def without_pauses(trace: Trace) -> Trace:
    """The same run, with what came after each pause moved forward to where the pause began."""
    stopped = pauses(trace)
    return (
        replace(trace, events=tuple(_Moved(stopped)(event) for event in trace.events)) if stopped else trace
    )


class _Moved:
    """Events with the pauses before them taken out."""

    def __init__(self, stopped: list[Interval]) -> None:
        self._ends = [end for _, end in stopped]
        self._before = [0, *accumulate(end - start for start, end in stopped)]

    def __call__(self, event: Event) -> Event:
        return replace(
            event,
            ready=self._time(event.ready),
            start=self._time(event.start),
            met=self._time(event.met),
            end=self._time(event.end),
        )

    def _time(self, time: int) -> int:
        """No op is under way in a pause, so no time lies inside one."""
        return time - self._before[bisect_right(self._ends, time)]

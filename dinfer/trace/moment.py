"""A run at one moment of its trace: what each lane does, and what has gone over each link by then. Pure.

Looked up in indexes that are made once for a trace, so that a moment costs a few searches for each lane and link.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Literal, NamedTuple

from dinfer.display import Composed, Displayable, Table
from dinfer.tabular import TableRow, Tabular
from dinfer.trace.events import COMPUTE, Event
from dinfer.trace.intervals import Interval, union
from dinfer.trace.shares import without_pauses
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import LinkRanks, by_link, transfers

LanePhase = Literal["", "computes", "on the wire", "waits for its peer", "waits for its data"]
"""of a lane, what its op does; "": the lane is between two ops"""

PHASES: tuple[LanePhase, ...] = ("computes", "on the wire", "waits for its peer", "waits for its data")


ABOUT_LINKS = {
    "MB": "megabytes of payload that had arrived by then",
    "messages": "messages that had arrived by then",
    "on the wire": "messages under way then",
    "waiting": "messages that were ready at their sender, and one of the two ranks had not come",
}
"""what the columns of a moment's links mean"""


class LaneMoment(NamedTuple):
    """One lane: the op that it is in, in which phase, and the last op that it has ended; None where there is none."""

    rank: int
    lane: str
    phase: LanePhase
    event: Event | None
    last: Event | None


class LinkMoment(NamedTuple):
    """One link by then. `arrived`, `bytes`: the messages that have arrived, and their payload; `moving`: how many are
    on the wire; `waiting`: how many are ready at their sender, and one of the two ranks has not come."""

    source: int
    target: int
    arrived: int
    bytes: int
    moving: int
    waiting: int


@dataclass(frozen=True, repr=False)
class Moment(Composed, Tabular):
    """What `run.at(0.25)` returns. `at`: nanoseconds on the trace's clock, without pauses."""

    at: int
    lanes: tuple[LaneMoment, ...]
    links: tuple[LinkMoment, ...]

    def _parts(self) -> Iterator[str | Displayable]:
        """The lanes that are in an op, and the links."""
        lanes = [
            (lane.rank, lane.lane, lane.event.name, lane.phase)
            for lane in self.lanes
            if lane.event is not None
        ]
        if lanes:
            yield Table(("rank", "lane", "op", "phase"), lanes)
        else:
            yield "no lane is in an op"
        links = [
            (
                f"{link.source}→{link.target}",
                f"{link.bytes / 1e6:.3f}",
                link.arrived,
                link.moving,
                link.waiting,
            )
            for link in self.links
        ]
        if links:
            yield Table(("link", "MB", "messages", "on the wire", "waiting"), links, about=ABOUT_LINKS)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        """All lanes, and then all links."""
        columns = (
            *("rank", "lane", "op", "phase"),
            *("source", "target", "bytes", "messages", "on_the_wire", "waiting"),
        )
        lanes = (
            (one.rank, one.lane, one.event and one.event.name, one.phase, *[None] * 6) for one in self.lanes
        )
        links = (
            (*[None] * 4, one.source, one.target, one.bytes, one.arrived, one.moving, one.waiting)
            for one in self.links
        )
        return columns, chain(lanes, links)


class LinkTimes(NamedTuple):
    """The messages of one link. `ends`, `mets` and `offers` are sorted; `sums[n]`: the bytes of the first n that ended;
    `moving`, `waiting`: when any was on the wire, and when any waited for a rank."""

    ends: list[int]
    mets: list[int]
    offers: list[int]
    sums: list[int]
    moving: list[Interval]
    waiting: list[Interval]

    def arrived(self, at: int) -> int:
        """How many messages had arrived."""
        return bisect_right(self.ends, at)


def moment(trace: Trace, at: int) -> Moment:
    """What every lane and link did at that time, in nanoseconds of the trace's clock; before the first op and after the
    last nothing is under way. Moments of decode and of checks have lanes; links are those of prefill."""
    lanes = tuple(_lane_at(*key, *times, at) for key, times in trace.once(_by_lane).items())
    return Moment(at, lanes, tuple(_links_at(trace, at)))


def moment_after(trace: Trace, seconds: float) -> Moment:
    """That many seconds after the first op began; pauses between steps do not count."""
    moving = without_pauses(trace)
    return moment(moving, moving.began + round(seconds * 1e9))


def link_times(trace: Trace) -> dict[LinkRanks, LinkTimes]:
    """By link, in order. Computed once."""
    return trace.once(_link_times)


def _link_times(trace: Trace) -> dict[LinkRanks, LinkTimes]:
    found = {}
    for link, some in by_link(transfers(trace)).items():  # in the order in which they arrived
        found[link] = LinkTimes(
            [one.end for one in some],
            sorted(one.met for one in some),
            sorted(one.offered for one in some),
            [0, *accumulate(one.bytes for one in some)],
            union((one.met, one.end) for one in some),
            union((one.offered, one.met) for one in some if one.met > one.offered),
        )
    return found


def _links_at(trace: Trace, at: int) -> Iterator[LinkMoment]:
    for link, times in link_times(trace).items():
        arrived, met, offered = (
            times.arrived(at),
            bisect_right(times.mets, at),
            bisect_right(times.offers, at),
        )
        yield LinkMoment(*link, arrived, times.sums[arrived], met - arrived, offered - met)


def _by_lane(trace: Trace) -> dict[tuple[int, str], tuple[list[Event], list[int]]]:
    """The ended events of each lane in the order of their ends, and these; lanes in the order of their names."""
    found: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in trace.events:
        if event.end:
            found[event.rank, event.lane].append(event)
    return {key: (found[key], [event.end for event in found[key]]) for key in sorted(found)}


def _lane_at(rank: int, lane: str, events: list[Event], ends: list[int], at: int) -> LaneMoment:
    after = bisect_right(ends, at)
    last = events[after - 1] if after else None
    event = events[after] if after < len(events) else None
    if event is None or event.ready > at:
        return LaneMoment(rank, lane, "", None, last)
    return LaneMoment(rank, lane, phase_of(event, at), event, last)


def phase_of(event: Event, at: int) -> LanePhase:
    """What an op does at a time at which it is under way."""
    if at < event.start:
        return "waits for its data"
    if at < event.met:
        return "waits for its peer"
    return "computes" if event.kind in COMPUTE or event.peer is None else "on the wire"


def times_of(trace: Trace, rank: int, lane: str) -> list[Event]:
    """The ended events of one lane, in the order of their ends; [] where there are none."""
    events, _ = trace.once(_by_lane).get((rank, lane), ([], []))
    return events


def ended_between(ends: list[int], begin: int, end: int) -> tuple[int, int]:
    """The range of those sorted times that lie after `begin` and not after `end`."""
    return bisect_right(ends, begin), bisect_left(ends, end + 1)

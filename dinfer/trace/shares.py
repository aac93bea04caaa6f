"""Shares: how much of each rank's prefill went into computing, data on the wire, data waiting for a peer, or nothing.

Of two of these at once the first counts: computing hides communication. Pauses, in which no rank had an op to run
because the user had stopped the run, are left out. Pure.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from math import floor
from operator import attrgetter
from typing import NamedTuple

from dinfer.trace.events import COLLECTIVES
from dinfer.trace.intervals import Interval, common, length, minus, seconds, union
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import Transfer, by_link, transfers

LEAST_PAUSE_NS = 10_000_000


def pauses(trace: Trace) -> list[Interval]:
    """The times of at least LEAST_PAUSE_NS in which no rank had an op that was allowed to start. A watched program has
    none: it works, then."""
    return [] if trace.is_watched else trace.once(_pauses)


def _pauses(trace: Trace) -> list[Interval]:
    found: list[Interval] = []
    ended = [event for event in trace.events if event.end]
    ended.sort(key=attrgetter("end"), reverse=True)
    ready = ended[0].end if ended else 0  # the earliest of those that have been seen
    for event in (
        ended
    ):  # all that follow end no later than this one, so none of them lies between its end and `ready`
        if ready - event.end >= LEAST_PAUSE_NS:
            found.append((event.end, ready))
        ready = min(ready, event.ready)
    return found[::-1]


def without_pauses(trace: Trace) -> Trace:
    """The same run without its pauses: what follows one is moved to where it began."""
    return trace.once(_without_pauses)


def _without_pauses(trace: Trace) -> Trace:
    stopped = pauses(trace)
    if not stopped:
        return trace
    ends = [end for _, end in stopped]
    before = [0, *accumulate(end - start for start, end in stopped)]

    def moved(time: int) -> int:
        """No op runs in a pause, so no time lies in one."""
        return time - before[bisect_right(ends, time)]

    events = (
        replace(e, ready=moved(e.ready), start=moved(e.start), met=moved(e.met), end=moved(e.end))
        for e in trace.events
    )
    return replace(trace, events=tuple(events))


class Share(NamedTuple):
    """One rank's prefill, split into disjoint intervals of the trace's clock.

    `compute`: it computed, or, of a watched program, was in no op of torch.distributed. Otherwise `wire`: it sent or
    received data. Otherwise `wait`: data was ready, at this rank or for it, and one side had not come. Otherwise
    `bubble`: it had nothing to do until another rank had computed something. `hidden`: data on the wire while it
    computed; a part of `compute`.
    """

    rank: int
    compute: list[Interval]
    wire: list[Interval]
    wait: list[Interval]
    bubble: list[Interval]
    hidden: list[Interval]

    @property
    def prefill_s(self) -> float:
        return sum(map(seconds, (self.compute, self.wire, self.wait, self.bubble)))

    @property
    def wire_s(self) -> float:
        return seconds(self.wire)

    @property
    def wait_s(self) -> float:
        return seconds(self.wait)

    @property
    def exposed_s(self) -> float:
        """Seconds of communication that no computing hid."""
        return self.wire_s + self.wait_s

    @property
    def communication_s(self) -> float:
        """Seconds of communication, hidden or not."""
        return self.exposed_s + seconds(self.hidden)


class LinkShare(NamedTuple):
    """Seconds in which a link's two ranks, added up, did not compute because of it; `late`: the rank that came last
    for most of the waiting."""

    source: int
    target: int
    wire_s: float
    wait_s: float
    late: int | None

    @property
    def exposed_s(self) -> float:
        return self.wire_s + self.wait_s


ABOUT_PARTS = {
    "compute": "share of all ranks' prefill in which they computed; communication meanwhile is hidden",
    "exposed_wire": "share in which a rank computed nothing and data was on the wire, from it or to it",
    "exposed_wait": "share in which a rank computed nothing and data lay ready for a peer that had not come",
    "bubble": "share in which a rank had nothing to do until another rank had computed something",
}
"""the parts of prefill, which add up to all of it, and what each is"""


class Shares(NamedTuple):
    """All ranks, and all links, the most exposed first."""

    ranks: list[Share]
    links: list[LinkShare]

    @property
    def wire_s(self) -> float:
        """Seconds of data on the wire, added up over all ranks."""
        return sum(rank.wire_s for rank in self.ranks)

    @property
    def wait_s(self) -> float:
        """Seconds of waiting for a peer, added up over all ranks."""
        return sum(rank.wait_s for rank in self.ranks)

    @property
    def exposed(self) -> float:
        """The share of exposed communication in the prefill of all ranks, 0 to 1."""
        return _part(sum(rank.exposed_s for rank in self.ranks), sum(rank.prefill_s for rank in self.ranks))

    @property
    def bubble(self) -> float:
        """The share of prefill in which ranks waited for others to compute, 0 to 1."""
        bubble = sum(seconds(rank.bubble) for rank in self.ranks)
        return _part(bubble, sum(rank.prefill_s for rank in self.ranks))

    @property
    def parts(self) -> dict[str, float]:
        """What the prefill of all ranks went into, as shares that add up to 1: see ABOUT_PARTS. Empty where nothing
        ran."""
        nanoseconds = {
            "compute": sum(length(rank.compute) for rank in self.ranks),
            "exposed_wire": sum(length(rank.wire) for rank in self.ranks),
            "exposed_wait": sum(length(rank.wait) for rank in self.ranks),
            "bubble": sum(length(rank.bubble) for rank in self.ranks),
        }
        whole = sum(nanoseconds.values())
        return {name: part / whole for name, part in nanoseconds.items()} if whole else {}

    @property
    def exposed_communication(self) -> float:
        """The share of communication that no computing hid, 0 to 1."""
        exposed = sum(rank.exposed_s for rank in self.ranks)
        return _part(exposed, sum(rank.communication_s for rank in self.ranks))


def shares(trace: Trace) -> Shares:
    """What the prefill of each rank and the time of each link went into. Computed once."""
    return trace.once(_shares)


def _shares(trace: Trace) -> Shares:
    found, stopped = transfers(trace), pauses(trace)
    of_rank: dict[int, list[Transfer]] = {}
    for one in found:
        of_rank.setdefault(one.source, []).append(one)
        if one.target != one.source:
            of_rank.setdefault(one.target, []).append(one)
    ranks = [_share(trace, rank, of_rank.get(rank, []), stopped) for rank in trace.ranks]
    ranks = [share for share in ranks if share.prefill_s > 0]
    by_rank = {share.rank: share for share in ranks}
    links = []
    for link, of_link in by_link(found).items():
        moving = union((t.met, t.end) for t in of_link)
        ready = union((t.offered, t.met) for t in of_link if t.met > t.offered)
        ends = [by_rank[rank] for rank in link if rank in by_rank]
        wire_s = sum(seconds(common(share.wire, moving)) for share in ends)
        wait_s = sum(seconds(common(share.wait, ready)) for share in ends)
        links.append(LinkShare(*link, wire_s, wait_s, _latest(of_link)))
    return Shares(ranks, sorted(links, key=lambda link: -link.exposed_s))


def _share(trace: Trace, rank: int, of_rank: list[Transfer], stopped: list[Interval]) -> Share:
    """`of_rank`: the transfers from it and to it."""
    mine = list(trace.prefill(rank))
    prefill = minus([(trace.began, trace.ended(rank))], stopped)
    together = [event for event in mine if event.kind in COLLECTIVES]
    moving = union([*((t.met, t.end) for t in of_rank), *((e.met, e.end) for e in together)])
    ready = union(
        [*((t.offered, t.met) for t in of_rank if t.met > t.offered), *((e.start, e.met) for e in together)]
    )
    computing = trace.computing(rank)
    compute, rest = common(prefill, computing), minus(prefill, computing)
    wire, rest = common(rest, moving), minus(rest, moving)
    wait, bubble = common(rest, ready), minus(rest, ready)
    return Share(rank, compute, wire, wait, bubble, common(compute, moving))


def _latest(found: Iterable[Transfer]) -> int | None:
    """The rank for which the transfers of one link have waited longest."""
    waited: dict[int | None, int] = {}
    for one in found:
        waited[one.late] = waited.get(one.late, 0) + one.waited
    return max(waited, key=lambda rank: waited[rank]) if any(waited.values()) else None


def percentages(parts: Sequence[float]) -> list[str]:
    """Shares that add up to 1 as text, such as `41.3 %`, rounded so that these numbers add up to 100, too."""
    tenths = [floor(1000 * part) for part in parts]
    missing = round(1000 * sum(parts)) - sum(tenths)
    by_rest = sorted(range(len(parts)), key=lambda n: tenths[n] - 1000 * parts[n])
    for n in by_rest[: max(0, missing)]:
        tenths[n] += 1
    return [f"{one / 10:.1f} %" for one in tenths]


def _part(some: float, all_of_it: float) -> float:
    return some / all_of_it if all_of_it > 0 else 0.0

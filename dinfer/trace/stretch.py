"""A stretch of a trace: what each rank's time in it went into, and what each link carried. Pure.

The parts are those of `shares`, cut to the stretch, and what none of them covers, so that they add up to it exactly;
and the totals of two stretches that follow each other add up to those of both.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from dinfer.display import Composed, Displayable, Table
from dinfer.tabular import TableRow, Tabular
from dinfer.trace.export import TraceError
from dinfer.trace.intervals import common, length
from dinfer.trace.moment import ended_between, link_times
from dinfer.trace.shares import Shares, shares, without_pauses
from dinfer.trace.trace import Trace

ABOUT_STRETCH = {
    "compute": "a rank computed; data on the wire meanwhile is hidden, and does not count as wire",
    "wire": "a rank computed nothing, and data was on the wire, from it or to it",
    "wait": "a rank computed nothing, and data lay ready for a peer that had not come",
    "bubble": "a rank had nothing to do until another rank had computed something",
    "rest": "not prefill: the run was paused, decoded, or this rank had done its last op of prefill",
}
"""what the parts of a rank's time are, and which come first where two are so at once"""


class RankStretch(NamedTuple):
    """Nanoseconds of one rank, by part: see ABOUT_STRETCH. They add up to the stretch."""

    rank: int
    compute: int
    wire: int
    wait: int
    bubble: int
    rest: int


class LinkStretch(NamedTuple):
    """One link. `transfers`, `bytes`: of the messages that arrived in the stretch; `moving`, `waiting`: nanoseconds in
    which any of its messages was on the wire, and in which any lay ready for a rank that had not come."""

    source: int
    target: int
    transfers: int
    bytes: int
    moving: int
    waiting: int


@dataclass(frozen=True, repr=False)
class Stretch(Composed, Tabular):
    """What `run.stretch(0.1, 0.2)` returns. `begin`, `end`: nanoseconds on the trace's clock, without pauses."""

    begin: int
    end: int
    ranks: tuple[RankStretch, ...]
    links: tuple[LinkStretch, ...]

    @property
    def parts(self) -> dict[str, int]:
        """Nanoseconds by part, added up over all ranks."""
        return {name: sum(getattr(rank, name) for rank in self.ranks) for name in ABOUT_STRETCH}

    def _parts(self) -> Iterator[str | Displayable]:
        """The ranks and the links, in milliseconds."""
        ranks = [(rank.rank, *map(_milliseconds, rank[1:])) for rank in self.ranks]
        ranks.append(("all", *map(_milliseconds, self.parts.values())))
        yield f"{_milliseconds(self.end - self.begin)} ms of each rank, in milliseconds by what they went into"
        yield Table(("rank", *ABOUT_STRETCH), ranks, about=ABOUT_STRETCH)
        links = [
            (
                f"{link.source}→{link.target}",
                f"{link.bytes / 1e6:.3f}",
                link.transfers,
                _milliseconds(link.moving),
                _milliseconds(link.waiting),
            )
            for link in self.links
        ]
        if links:
            yield Table(("link", "MB", "messages", "on the wire, ms", "waiting, ms"), links)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        """All ranks, and then all links; times in nanoseconds."""
        columns = ("rank", *ABOUT_STRETCH, "source", "target", "bytes", "messages", "on_the_wire", "waiting")
        ranks = ((*one, *[None] * 6) for one in self.ranks)
        links = (
            (*[None] * 6, one.source, one.target, one.bytes, one.transfers, one.moving, one.waiting)
            for one in self.links
        )
        return columns, chain(ranks, links)


def _milliseconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.3f}"


def stretch(trace: Trace, begin: int, end: int) -> Stretch:
    """The totals between two times in nanoseconds of the trace's clock. Raises TraceError where `end` is before
    `begin`."""
    if end < begin:
        raise TraceError(
            f"a stretch from {begin} to {end} ends before it begins: give the earlier time first."
        )
    whole = shares(trace)
    by_rank = {share.rank: share for share in whole.ranks}
    ranks = tuple(_rank(whole, rank, begin, end) for rank in trace.ranks if rank in by_rank)
    without = tuple(RankStretch(rank, 0, 0, 0, 0, end - begin) for rank in trace.ranks if rank not in by_rank)
    return Stretch(begin, end, tuple(sorted((*ranks, *without))), _links(trace, begin, end))


def stretch_between(trace: Trace, begin: float, end: float) -> Stretch:
    """The same between two times in seconds after the first op began; pauses between steps do not count."""
    moving = without_pauses(trace)
    return stretch(moving, *(moving.began + round(seconds * 1e9) for seconds in (begin, end)))


def _rank(whole: Shares, rank: int, begin: int, end: int) -> RankStretch:
    share, inside = next(one for one in whole.ranks if one.rank == rank), [(begin, end)]
    parts = [length(common(part, inside)) for part in (share.compute, share.wire, share.wait, share.bubble)]
    compute, wire, wait, bubble = parts
    return RankStretch(rank, compute, wire, wait, bubble, end - begin - sum(parts))


def _links(trace: Trace, begin: int, end: int) -> tuple[LinkStretch, ...]:
    found, inside = [], [(begin, end)]
    for link, times in link_times(trace).items():
        first, after = ended_between(times.ends, begin, end)
        found.append(
            LinkStretch(
                *link,
                after - first,
                times.sums[after] - times.sums[first],
                length(common(times.moving, inside)),
                length(common(times.waiting, inside)),
            )
        )
    return tuple(found)

"""Transfers: what went over each link, each send combined with its recv, and percentiles of how long that took. Pure.

If only one of the two is in the trace, its times stand for both.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import ceil
from operator import attrgetter
from typing import NamedTuple

from dinfer.trace.clocks import error_between, rank_clocks
from dinfer.trace.events import COLLECTIVES, Event, pairs
from dinfer.trace.trace import Trace

LinkRanks = tuple[int, int]
"""(source rank, target rank)"""


class Transfer(NamedTuple):
    """One message. Times are nanoseconds of the trace's clock.

    `offered`: the payload was there and its send had begun. `met`: the other rank had begun as well. `end`: the
    receiver had it all. Each difference is of times on one rank's clock. `late`: the rank that began last, if known: on
    two hosts, whose clocks agree to some extent only, if it did by more than that.
    """

    source: int
    target: int
    what: str
    chunk: int | None
    layer: int | None
    bytes: int
    offered: int
    met: int
    end: int
    late: int | None

    @property
    def link(self) -> LinkRanks:
        return self.source, self.target

    @property
    def waited(self) -> int:
        """Nanoseconds from `offered` to `met`."""
        return self.met - self.offered

    @property
    def wire(self) -> int:
        """Nanoseconds on the wire."""
        return self.end - self.met

    @property
    def latency(self) -> int:
        return self.end - self.offered


class Spread(NamedTuple):
    """Percentiles of durations, in seconds."""

    number: int
    p50: float
    p90: float
    p99: float
    longest: float


def transfers(trace: Trace) -> list[Transfer]:
    """All messages of prefill whose two ranks are known, in the order in which they arrived. Computed once."""
    return trace.once(_transfers)


def _transfers(trace: Trace) -> list[Transfer]:
    found, clocks = [], rank_clocks(trace.about)
    for send, recv in pairs(trace.events):
        seen = recv or send
        assert seen is not None
        assert seen.peer is not None
        source, target = (seen.peer, seen.rank) if seen.kind == "recv" else (seen.rank, seen.peer)
        late = None
        error = error_between(clocks, source, target) if send and recv else 0
        if send and recv and error is not None and not 0 < abs(send.start - recv.start) <= error:
            late = source if send.start > recv.start else target
        from_sender, met = send or seen, seen.met
        offered = met - (from_sender.met - from_sender.start)
        block = (seen.what, seen.chunk, seen.layer, seen.bytes)
        found.append(Transfer(source, target, *block, offered, met, seen.end, late))
    found.sort(key=attrgetter("end", "source", "target"))
    return found


def by_link(found: Iterable[Transfer]) -> dict[LinkRanks, list[Transfer]]:
    """The transfers of each link, by link in order."""
    links: dict[LinkRanks, list[Transfer]] = defaultdict(list)
    for one in found:
        links[one.link].append(one)
    return dict(sorted(links.items()))


def by_link_and_layer(found: Iterable[Transfer]) -> dict[tuple[LinkRanks, int], list[Transfer]]:
    """The transfers whose layer is known, by link and layer in order."""
    layers: dict[tuple[LinkRanks, int], list[Transfer]] = defaultdict(list)
    for one in found:
        if one.layer is not None:
            layers[one.link, one.layer].append(one)
    return dict(sorted(layers.items()))


def by_collective(events: Iterable[Event]) -> dict[tuple[str, str], list[Event]]:
    """The ended collectives of a watched program, by kind and group in order."""
    found: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in events:
        if event.call and event.end and event.kind in COLLECTIVES:
            found[event.kind, event.call.group].append(event)
    return dict(sorted(found.items()))


def spread(nanoseconds: Iterable[int]) -> Spread:
    """The percentiles of these durations. Raises ValueError if there are none."""
    ordered = sorted(nanoseconds)
    if not ordered:
        raise ValueError("no durations, so no percentiles")
    p50, p90, p99 = (percentile(ordered, share) / 1e9 for share in (0.5, 0.9, 0.99))
    return Spread(len(ordered), p50, p90, p99, ordered[-1] / 1e9)


def percentile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that is at least as large as this share of them (nearest rank)."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)]

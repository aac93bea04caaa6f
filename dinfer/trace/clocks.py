"""Brings events of several hosts onto one clock, and says how far off that may be. Pure.

Each host counts nanoseconds from a moment of its own. Readings are taken as by NTP: a question is sent, and
answered with when it came there; its two ways took no less than nothing, so the other clock is known to half of the
round trip. Of the readings of a few seconds the one with the shortest trip counts, and between two of these the offset
is interpolated, since clocks drift.
"""

from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

from dinfer.trace.events import Event

WINDOW_NS = 4_000_000_000

DRIFT = 1e-4
"""by which part two clocks may run differently: twice what quartz is specified to"""

KEY = "clocks"
"""in a trace's description: by rank, a `RankClock` as a dict; absent where all ranks have one clock"""


class ClockReading(NamedTuple):
    """Nanoseconds. `at`: on the host's clock; `offset`: by how much that is ahead of this process's; `error`: by how
    much the offset may be wrong."""

    at: int
    offset: int
    error: int


@dataclass
class HostClock:
    """What is known of one host's clock. One thread notes; others may read at any time."""

    readings: list[ClockReading] = field(default_factory=list)
    """the best of each window, in the order of time"""
    _window: int = -1

    def note(self, sent: int, received: int, answered: int, came: int) -> None:
        """A question and its answer: `sent` and `came` on this process's clock, the others on the host's."""
        trip = (came - sent) - (answered - received)
        if trip < 0:  # no clock that runs gives this
            return
        reading = ClockReading(
            (received + answered) // 2, (received - sent + answered - came) // 2, trip // 2 + 1
        )
        window = came // WINDOW_NS
        if window != self._window:
            self._window = window
            self.readings.append(reading)
        elif reading.error < self.readings[-1].error:
            self.readings[-1] = reading

    def to_ours(self, at: int) -> int:
        """A time of the host's clock, on this process's."""
        return at - self._offset(at)

    def _offset(self, at: int) -> int:
        known = self.readings
        after = bisect(known, at, key=lambda reading: reading.at)
        if after in (0, len(known)):
            return known[-1 if after else 0].offset
        one, other = known[after - 1], known[after]
        share = (at - one.at) / (other.at - one.at)
        return one.offset + round(share * (other.offset - one.offset))

    def error(self, first: int, last: int) -> int:
        """By how much `to_ours` may be wrong between two times of the host's clock, at most."""
        known = self.readings
        low = max(0, bisect(known, first, key=lambda reading: reading.at) - 1)
        used = known[low : bisect(known, last, key=lambda reading: reading.at) + 1]
        inner = [(after.at - before.at) / 2 for before, after in pairwise(used)]
        away = max([0.0, used[0].at - first, last - used[-1].at, *inner])
        return max(reading.error for reading in used) + round(DRIFT * away)


@dataclass(frozen=True)
class RankClock:
    """Which clock a rank's events were recorded on, by number. `offset_ns`: nanoseconds by which it was ahead of
    clock 0; `error_ns`: by which that may be wrong, None if it was never read."""

    clock: int
    offset_ns: int = 0
    error_ns: int | None = 0

    def as_dict(self) -> dict[str, int | None]:
        return {"clock": self.clock, "offset_ns": self.offset_ns, "error_ns": self.error_ns}


def on_one_clock(
    by_rank: Sequence[Sequence[Event]], clocks: Sequence[HostClock | None]
) -> tuple[list[list[Event]], dict[str, Any]]:
    """The events of ranks on this process's clock, and what to write into the trace's description. `clocks`: by rank;
    None: it has this process's clock."""
    if not any(clocks):
        return [list(events) for events in by_rank], {}
    numbers: dict[int, int] = {id(None): 0}
    found, about = [], []
    for events, clock in zip(by_rank, clocks, strict=True):
        number = numbers.setdefault(id(clock), len(numbers))
        if clock is None:
            about.append(RankClock(number))
        elif not clock.readings:
            about.append(RankClock(number, error_ns=None))
        else:
            first = min((event.ready for event in events), default=clock.readings[-1].at)
            last = max((event.end for event in events), default=first)
            offset = first - clock.to_ours(first)
            about.append(RankClock(number, offset, clock.error(first, last)))
        found.append(moved(events, clock))
    return found, {KEY: [one.as_dict() for one in about]}


def moved(events: Iterable[Event], clock: HostClock | None) -> list[Event]:
    """Events of one rank on this process's clock; as they are where its own was never read."""
    if clock is None or not clock.readings:
        return list(events)
    to = clock.to_ours
    return [
        replace(
            event,
            ready=to(event.ready),
            start=to(event.start),
            met=to(event.met),
            end=event.end and to(event.end),
        )
        for event in events
    ]


def rank_clocks(about: dict[str, Any]) -> list[RankClock]:
    """What a trace's description says of its ranks' clocks, [] for nothing, or for something else than it should."""
    given = about.get(KEY)
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        return []
    found = []
    for one in given:
        clock, offset, error = one.get("clock"), one.get("offset_ns", 0), one.get("error_ns")
        if not isinstance(clock, int) or not isinstance(offset, int) or not isinstance(error, int | None):
            return []
        found.append(RankClock(clock, offset, error))
    return found


def error_between(clocks: Sequence[RankClock], one: int, other: int) -> int | None:
    """Nanoseconds by which times of two ranks may be wrong against each other; None if that is not known."""
    if not (0 <= one < len(clocks) and 0 <= other < len(clocks)) or clocks[one].clock == clocks[other].clock:
        return 0
    errors = clocks[one].error_ns, clocks[other].error_ns
    return None if None in errors else sum(error for error in errors if error is not None)


def clocks_text(clocks: Sequence[RankClock]) -> str:
    """How well the clocks agree, as a sentence; "" where all ranks have one."""
    pairs = [(a, b) for a in range(len(clocks)) for b in range(a) if clocks[a].clock != clocks[b].clock]
    if not pairs:
        return ""
    unread = [rank for rank, one in enumerate(clocks) if one.error_ns is None]
    count = len({one.clock for one in clocks})
    if unread:
        which = f"that of rank {unread[0]} was"
        if len(unread) > 1:
            which = f"those of ranks {', '.join(map(str, unread))} were"
        return f"the ranks have {count} clocks, of which {which} never read: times do not compare"
    worst = max(error_between(clocks, a, b) or 0 for a, b in pairs)
    return (
        f"the hosts' clocks ({count}) were measured and are told as one: between ranks of two hosts, times are right "
        f"to {_milliseconds(worst)}"
    )


def _milliseconds(nanoseconds: int) -> str:
    return f"{max(nanoseconds, 10_000) / 1e6:.3g} ms"

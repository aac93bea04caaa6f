"""What to look at in a trace: ops that took long, messages that a rank kept waiting, and long bubbles. Pure."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from statistics import median
from typing import Literal, NamedTuple

from dinfer.trace.events import COMPUTE, Event
from dinfer.trace.shares import shares
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import Transfer, transfers

NotableKind = Literal["slow op", "late", "bubble"]

MOST = 40
"""of each kind, the longest"""

SLOW_TIMES, LATE_TIMES = 2.0, 2.0
"""an op is slow that took so many times the median of its kind and number of tokens; a message is late that waited for
so many times the median that a message of its kind was on the wire"""

LEAST_NS = 100_000
"""what is shorter is not told: clocks, and Python itself, are no better"""

BUBBLE_PART = 0.02
"""of prefill, that a bubble takes at least"""


class Notable(NamedTuple):
    """`rank`: the one that computed, came late, or had nothing to do; `lane`: of it, if known; `peer`: of a late
    message, the rank that waited. `begin`, `end`: nanoseconds on the trace's clock; `text`: in words."""

    kind: NotableKind
    rank: int
    lane: str
    layer: int | None
    chunk: int | None
    peer: int | None
    begin: int
    end: int
    text: str

    @property
    def took(self) -> int:
        """Nanoseconds."""
        return self.end - self.begin


def notable(trace: Trace) -> list[Notable]:
    """The slow ops, late messages and bubbles of prefill, in the order of time. Computed once."""
    return trace.once(_notable)


def _notable(trace: Trace) -> list[Notable]:
    kinds = (_slow(trace), _late(trace), _bubbles(trace))
    longest = [one for kind in kinds for one in sorted(kind, key=lambda one: -one.took)[:MOST]]
    return sorted(longest, key=lambda one: (one.begin, one.rank))


def milliseconds(nanoseconds: float) -> str:
    """For example `12.3 ms`."""
    return f"{nanoseconds / 1e6:.3g} ms"


def _slow(trace: Trace) -> Iterator[Notable]:
    alike: dict[tuple[str, int], list[Event]] = defaultdict(list)
    for event in trace.prefill():
        if event.kind in COMPUTE:
            alike[event.kind, event.tokens].append(event)
    for some in alike.values():
        usual = median(event.busy for event in some)
        for event in some:
            if event.busy > SLOW_TIMES * usual and event.busy - usual > LEAST_NS:
                text = (
                    f"slow: {event.name} on rank {event.rank} took {milliseconds(event.busy)}, "
                    f"{event.busy / max(usual, 1):.1f} × the median"
                )
                place = (event.rank, event.lane, event.layer, event.chunk, None)
                yield Notable("slow op", *place, event.met, event.end, text)


def _late(trace: Trace) -> Iterator[Notable]:
    alike: dict[str, list[Transfer]] = defaultdict(list)
    for one in transfers(trace):
        alike[one.what].append(one)
    for what, some in alike.items():
        usual = median(one.wire for one in some)
        for one in some:
            if one.late is None or one.waited <= max(LATE_TIMES * usual, LEAST_NS):
                continue
            waiter = one.target if one.late == one.source else one.source
            block = " ".join(filter(None, (what, _of(one.chunk, "c"), _of(one.layer, "l"))))
            text = (
                f"late: {block} {one.source}→{one.target}: rank {waiter} waited {milliseconds(one.waited)} for rank "
                f"{one.late}"
            )
            yield Notable("late", one.late, "", one.layer, one.chunk, waiter, one.offered, one.met, text)


def _of(number: int | None, letter: str) -> str:
    return "" if number is None else f"{letter}{number}"


def _bubbles(trace: Trace) -> Iterator[Notable]:
    """Each with the block that ended it: the next that its rank computed."""
    for share in shares(trace).ranks:
        layers = sorted(
            (event for event in trace.prefill(share.rank) if event.kind == "layer"), key=lambda e: e.met
        )
        mets = [event.met for event in layers]
        least = max(LEAST_NS, BUBBLE_PART * 1e9 * share.prefill_s)
        for begin, end in share.bubble:
            if end - begin < least:
                continue
            after = bisect_right(mets, end - 1)
            event = layers[min(after, len(layers) - 1)] if layers else None
            until = f", until {event.name}" if event and event.met >= end else ""
            text = f"bubble: rank {share.rank} idle for {milliseconds(end - begin)}{until}"
            place = (event.lane, event.layer, event.chunk) if event else ("", None, None)
            yield Notable("bubble", share.rank, *place, None, begin, end, text)

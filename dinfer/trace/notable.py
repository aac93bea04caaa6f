"""What to look at in a trace: ops that took long, messages that were long on the wire or that a rank kept waiting, and
long bubbles. Pure."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from heapq import nlargest
from itertools import chain
from statistics import median, median_low
from typing import Literal, NamedTuple

from dinfer.trace.events import COMPUTE, Event, block_text
from dinfer.trace.shares import shares
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import LinkRanks, Transfer, by_link, transfers

NotableKind = Literal["slow op", "slow message", "late", "bubble"]

MOST = 40
"""of each kind, the longest"""

SLOW_TIMES, LATE_TIMES = 2.0, 2.0
"""an op is slow that took so many times the median of its kind and number of tokens; a message is slow that was on the
wire for so many times what one of its kind and size is on a usual link, and late that waited for so many times the
median of that"""

LEAST_NS = 100_000
"""what is shorter is not told: clocks, and Python itself, are no better"""

BUBBLE_PART = 0.02
"""of prefill, that a bubble takes at least"""


class Notable(NamedTuple):
    """`rank`: the one that computed, received a slow message, came late, or had nothing to do; `lane`: of it, if known;
    `peer`: of a slow message, the rank that sent it, of a late one the rank that waited. `begin`, `end`: nanoseconds on
    the trace's clock; `text`: in words; `op`: the kind of a slow op; `what`, `link`: of a message."""

    kind: NotableKind
    rank: int
    lane: str
    layer: int | None
    chunk: int | None
    peer: int | None
    begin: int
    end: int
    text: str
    op: str = ""
    what: str = ""
    link: LinkRanks | None = None

    @property
    def took(self) -> int:
        """Nanoseconds."""
        return self.end - self.begin


def notable(trace: Trace) -> list[Notable]:
    """The longest slow ops, slow and late messages and bubbles of prefill, MOST of each, in the order of time. Computed
    once."""
    return trace.once(_longest)


def all_notable(trace: Trace) -> list[Notable]:
    """All of them, the longest first. Not kept: on one slow link they are as many as its messages."""
    return sorted(chain.from_iterable(_kinds(trace)), key=lambda one: -one.took)


def _longest(trace: Trace) -> list[Notable]:
    longest = [one for some in _kinds(trace) for one in nlargest(MOST, some, key=lambda one: one.took)]
    return sorted(longest, key=lambda one: (one.begin, one.rank))


def _kinds(trace: Trace) -> tuple[Iterator[Notable], ...]:
    return _slow(trace), _slow_messages(trace), _late(trace), _bubbles(trace)


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
                yield Notable("slow op", *place, event.met, event.end, text, op=event.kind)


def _slow_messages(trace: Trace) -> Iterator[Notable]:
    alike: dict[str, dict[int, list[Transfer]]] = defaultdict(lambda: defaultdict(list))
    for one in transfers(trace):
        alike[one.what][one.bytes].append(one)
    for sizes in alike.values():
        usual_of = _usual_wire(sizes)
        for size, one in ((size, one) for size, some in sizes.items() for one in some):
            usual = usual_of[size]
            if one.wire > SLOW_TIMES * usual and one.wire - usual > LEAST_NS:
                text = (
                    f"slow: {_name(one)} took {milliseconds(one.wire)} on the wire, {one.wire / max(usual, 1):.1f} × "
                    "what is usual"
                )
                place = (one.target, "", one.layer, one.chunk, one.source)
                yield Notable(
                    "slow message", *place, one.met, one.end, text, what=one.what, link=one.link
                )  # fmt: skip


def _usual_wire(sizes: Mapping[int, Iterable[Transfer]]) -> dict[int, float]:
    """Nanoseconds on the wire of messages of one kind, by their bytes: on the link in the middle of all links that have
    this size, of two the faster one, so that a slow one is told.

    Where one link alone has a size, it is also judged by the nearest other size, one that several links have if there
    is any: a smaller message takes no longer than that one, and a larger one no more than its bytes."""
    usual, shared = dict[int, float](), set[int]()
    for size, some in sizes.items():
        links = by_link(some).values()
        usual[size] = median_low(median(one.wire for one in of_link) for of_link in links)
        if len(links) > 1:
            shared.add(size)
    found = dict(usual)
    for size in usual.keys() - shared:
        if others := (shared or usual.keys()) - {size}:
            nearest = min(others, key=lambda other: abs(other - size))
            found[size] = min(usual[size], usual[nearest] * max(1.0, size / max(1, nearest)))
    return found


def _late(trace: Trace) -> Iterator[Notable]:
    alike: dict[tuple[str, int], list[Transfer]] = defaultdict(list)
    for one in transfers(trace):
        alike[one.what, one.bytes].append(one)
    for (what, _), some in alike.items():
        usual = median(one.wire for one in some)
        for one in some:
            if one.late is None or one.waited <= max(LATE_TIMES * usual, LEAST_NS):
                continue
            waiter = one.target if one.late == one.source else one.source
            text = f"late: {_name(one)}: rank {waiter} waited {milliseconds(one.waited)} for rank {one.late}"
            place = (one.late, "", one.layer, one.chunk, waiter)
            yield Notable("late", *place, one.offered, one.met, text, what=what, link=one.link)


def _name(one: Transfer) -> str:
    """For example `kv c3 l5 0→1`."""
    return f"{block_text(one.what, one.chunk, one.layer)} {one.source}→{one.target}"


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

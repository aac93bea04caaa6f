"""Slowest: how long each link's messages are on the wire, and the one that took longest. Pure."""

from collections import defaultdict
from statistics import median
from typing import NamedTuple

from dinfer.trace.events import Event
from dinfer.trace.notable import SLOW_TIMES
from dinfer.trace.trace import Trace

LEAST_NS = 1_000_000
"""nanoseconds; links of one host differ by less for no reason but its scheduler"""


class SlowestMessage(NamedTuple):
    """A link: `usual`, the median of its messages' nanoseconds on the wire; `is_slow`: whether that is more than
    SLOW_TIMES what other links take, and more by LEAST_NS. And its longest message: `took`, nanoseconds; `at`: in the
    middle of that, on the trace's clock; `rank`, `lane`: where it arrived; `text`: its name."""

    source: int
    target: int
    usual: int
    is_slow: bool
    took: int
    at: int
    rank: int
    lane: str
    layer: int | None
    chunk: int | None
    text: str


def slowest(trace: Trace) -> list[SlowestMessage]:
    """Of each link whose receiver's trace is there, in order. Computed once."""
    return trace.once(_slowest)


def _slowest(trace: Trace) -> list[SlowestMessage]:
    links: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in trace.prefill():
        if event.kind == "recv" and event.peer is not None and event.end:
            links[event.peer, event.rank].append(event)
    usual = {link: round(median(event.busy for event in some)) for link, some in links.items()}
    found = []
    for link, some in sorted(links.items()):
        others = median([other for name, other in usual.items() if name != link] or [usual[link]])
        is_slow = usual[link] > SLOW_TIMES * others and usual[link] - others > LEAST_NS
        longest = max(some, key=lambda event: event.busy)
        found.append(
            SlowestMessage(
                *link,
                usual=usual[link],
                is_slow=is_slow,
                took=longest.busy,
                at=(longest.met + longest.end) // 2,
                rank=longest.rank,
                lane=longest.lane,
                layer=longest.layer,
                chunk=longest.chunk,
                text=longest.name,
            )
        )
    return found

"""Trace: the merged events of all ranks, and the figures that views take from them. Pure."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from numbers import Integral
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

from dinfer.display import Composed, Displayable, Plot, Table, Tidy, plotted
from dinfer.errors import excerpt
from dinfer.tabular import TableRow, Tabular
from dinfer.trace.clocks import clocks_text, error_between, rank_clocks
from dinfer.trace.events import COMPUTE, CallRecord, Event, prefill_events
from dinfer.trace.export import TraceError, export
from dinfer.trace.intervals import Interval, minus, seconds, union

T = TypeVar("T")

LOOKED = "looked_ns"
"""the key of `about` for when a watched program was last looked at, in nanoseconds of the events' clock"""

TTFT = "ttft s"

ABOUT_RANKS = {
    "prefill s": "seconds from the first op of the run, on any rank, to this rank's last of prefill",
    TTFT: "time to first token: seconds from that first op until this rank had the first new token",
    "compute s": "seconds in which this rank computed, in prefill",
    "exposed sync s": "seconds in which this rank moved KV and computed nothing",
    "decode s": "seconds of computing new tokens, after prefill",
    "waiting s": "seconds in which at least one lane of this rank waited for a peer; others may have computed",
    "wire s": "seconds in which at least one message of this rank was on the wire, computing or not",
    "sent MB": "megabytes of payload that this rank sent",
    "received MB": "megabytes of payload that this rank received",
}
"""what the columns of a table of ranks mean"""

ABOUT_WATCHED = {
    "run s": "seconds from the first op on any rank to this rank's last",
    "own code s": "seconds in which this rank was in no op of torch.distributed, but did its own work or waited",
    **{name: ABOUT_RANKS[name] for name in ("waiting s", "wire s", "sent MB", "received MB")},
}
"""the same of other people's programs, of which only ops of torch.distributed are recorded"""

NAMES_WATCHED = {"run s": "prefill s", "own code s": "compute s"}
"""where a figure of such a program is found in `RankFigures`"""

OVERLAP = (
    "exposed sync: moved KV and computed nothing; waiting, wire: a lane waited for a peer, or a message was on the "
    "wire, also while others computed. A report divides prefill into shares that add up."
)
"""said below such a table"""


class RankFigures(NamedTuple):
    """One rank's part of a run. Times in seconds of the clock, so that what lanes do at once counts once and none is
    longer than prefill; bytes are payloads, without headers.

    `prefill_s`: from the first op of the run, on any rank, to this rank's last; `compute_s`: in which it computed;
    `exposed_sync_s`: in which it moved KV and computed nothing; `waiting_s`: in which at least one lane waited for a
    peer, while others may have computed; `wire_s`: in which at least one message was on the wire; `decode_s`: computing
    new tokens; `check_s`: the check of all blocks before decode. The last two are not part of prefill. `ttft_s`, the
    time to first token: from the first op of the run, on any rank, until this rank has chosen the first new token; None
    without new tokens. It may be shorter than `prefill_s`: the first token needs no block. (That all ranks have chosen
    the same is known once prefill has ended.)
    """

    rank: int
    prefill_s: float
    compute_s: float
    exposed_sync_s: float
    decode_s: float
    waiting_s: float
    wire_s: float
    sent_bytes: int
    received_bytes: int
    check_s: float = 0.0
    ttft_s: float | None = None


class LinkFigures(NamedTuple):
    """What went from one rank to another, as the receiver recorded it. `wire_s`: the time in which at least one message
    was on the wire; `bytes_per_s`: None if that is 0."""

    source: int
    target: int
    transfers: int
    bytes: int
    wire_s: float
    median_transfer_s: float
    bytes_per_s: float | None


@dataclass(frozen=True, repr=False)
class Trace(Tidy, Tabular, Composed):
    """What `run.trace` returns: `events` in the order in which they ended, and `about`, a description of the run in
    plain values. `plot()` and its like draw figures of it."""

    INTERNAL = frozenset({"computing", "ended", "is_watched", "once", "span", "unended"})

    events: tuple[Event, ...]
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def merge(cls, by_rank: Iterable[Sequence[Event]], **about: Any) -> "Trace":
        """One trace of each rank's events, whose clocks are the same or have been aligned."""
        events = sorted(chain.from_iterable(by_rank), key=attrgetter("end", "rank", "lane"))
        return cls(tuple(events), about)

    def _parts(self) -> Iterable[str | Displayable]:
        yield f"trace of {len(self.events):,} events: .events has them, .plot() draws them, .export() writes a file"
        if self.events:
            found = [figures._asdict() for figures in map(self.rank_figures, self.ranks)]
            yield rank_table(found, ABOUT_WATCHED if self.is_watched else ABOUT_RANKS)
            if not self.is_watched:
                yield OVERLAP
            if self.clocks:
                yield self.clocks

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        """A row for each event; of other people's code also what is known of the call."""
        own = [name for name in Event.__slots__ if name != "call"]
        calls = [name for name in CallRecord.__slots__ if self.is_watched]
        columns = [*own, *(name if name not in own else f"call_{name}" for name in calls)]
        rows = (
            [*(getattr(event, name) for name in own), *(getattr(event.call, name, None) for name in calls)]
            for event in self.events
        )
        return columns, rows

    @property
    def ranks(self) -> list[int]:
        """The ranks with events, in order."""
        return sorted(self._by_rank)

    @cached_property
    def is_watched(self) -> bool:
        """Whether it is of somebody else's program, of which only the ops of torch.distributed are known."""
        return any(event.call is not None for event in self.events)

    @property
    def clocks(self) -> str:
        """How well the hosts' clocks agree, in a sentence; "" where all ranks have one."""
        return clocks_text(rank_clocks(self.about))

    def clock_error_s(self, one: int, other: int) -> float | None:
        """Seconds by which times of two ranks may be wrong against each other: 0 on one host; None if not known."""
        error = error_between(rank_clocks(self.about), one, other)
        return None if error is None else error / 1e9

    @property
    def span(self) -> str:
        """What the times of its ranks are of: "prefill", or "the run" of somebody else's program."""
        return "the run" if self.is_watched else "prefill"

    @cached_property
    def _by_rank(self) -> dict[int, list[Event]]:
        found: dict[int, list[Event]] = {}
        for event in self.events:
            found.setdefault(event.rank, []).append(event)
        return found

    def _of(self, rank: int) -> list[Event]:
        """A rank's events, [] where there are none."""
        if not isinstance(rank, Integral):
            raise TraceError(f"rank is {excerpt(rank)}; it must be a whole number.")
        return self._by_rank.get(rank, [])

    @cached_property
    def _known(self) -> dict[Any, Any]:
        return {}

    def once(self, function: Callable[["Trace"], T]) -> T:
        """What the function returns for this trace, computed once: a trace does not change."""
        if function not in self._known:
            self._known[function] = function(self)
        found: T = self._known[function]
        return found

    def prefill(self, rank: int | None = None) -> Iterator[Event]:
        """The events of prefill, of one rank or of all: without those of decode and of the check before it."""
        if rank is not None:
            self._of(rank)  # refuses what is no rank
        return iter(self._prefill.get(rank, ()))

    @cached_property
    def _prefill(self) -> dict[int | None, list[Event]]:
        """The same, of all ranks under None."""
        found: dict[int | None, list[Event]] = {None: list(prefill_events(self.events))}
        for event in found[None]:
            found.setdefault(event.rank, []).append(event)
        return found

    def rank_figures(self, rank: int) -> RankFigures:
        """One rank's figures. Raises TraceError for a rank without events."""
        mine = self._of(rank)
        if not mine:
            raise TraceError(f"rank {rank} has no events in this trace; ranks with events: {self.ranks}.")
        prefill = list(self.prefill(rank))
        compute = self.computing(rank)
        sync = union((e.met, e.end) for e in prefill if e.what == "kv")
        transfers = [e for e in prefill if e.kind in ("send", "recv")]
        return RankFigures(
            rank=rank,
            prefill_s=(self.ended(rank) - self.began) / 1e9,
            compute_s=seconds(compute),
            exposed_sync_s=seconds(minus(sync, compute)),
            decode_s=sum(e.busy for e in mine if e.kind == "decode") / 1e9,
            waiting_s=seconds(union((e.start, e.met) for e in transfers)),
            wire_s=seconds(union((e.met, e.end) for e in transfers)),
            sent_bytes=sum(e.bytes for e in transfers if e.kind == "send"),
            received_bytes=sum(e.bytes for e in transfers if e.kind == "recv"),
            check_s=sum(e.busy for e in mine if e.kind == "check") / 1e9,
            ttft_s=self._first_token_s(mine),
        )

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, in seconds, of the slowest rank: see `RankFigures`; None without new tokens."""
        found = [one for rank in self.ranks if (one := self._first_token_s(self._of(rank))) is not None]
        return max(found, default=None)

    def _first_token_s(self, mine: Sequence[Event]) -> float | None:
        # the first of them: a token that was taken back is made again
        ends = (e.end for e in mine if (e.what, e.kind, e.index) == ("token", "decode", 0))
        end = next(ends, None)
        return None if end is None else (end - self.began) / 1e9

    def computing(self, rank: int) -> list[Interval]:
        """When a rank computed, in prefill. What a watched program computes is in no event: there it is all time in
        which it was in no op."""
        mine = list(self.prefill(rank))
        if not self.is_watched:
            return union((event.met, event.end) for event in mine if event.kind in COMPUTE)
        busy = union(
            [*((event.start, event.end) for event in mine), *(span for _, span in self.unended(rank))]
        )
        return minus([(self.began, self.ended(rank))], busy)

    def unended(self, rank: int) -> list[tuple[Event, Interval]]:
        """The ops of a watched program in which this rank was when it was last looked at, and since when until then."""
        until = self.about.get(LOOKED) or 0
        return [
            (event, (event.start, until))
            for event in self._of(rank)
            if event.call and event.call.is_waited and not event.end and event.start < until
        ]

    def ended(self, rank: int) -> int:
        """When this rank's prefill ended, or, of a watched program that hangs, when it was last looked at."""
        ends = [event.end for event in self.prefill(rank)] + [end for _, (_, end) in self.unended(rank)]
        return max(ends, default=self.began)

    @cached_property
    def began(self) -> int:
        """When the first op of the run began, on any rank."""
        return min((event.start for event in self.events), default=0)

    def export(self, form: str = "jsonl", path: str | Path | None = None) -> Path:
        """Write the trace to a file: "jsonl", an event a line; "perfetto", for ui.perfetto.dev and chrome://tracing. By
        default `trace.jsonl` or `trace.perfetto.json` here. Raises TraceError for another form, OSError.
        """
        return export(self.events, self.about, form, path)

    def link_figures(self) -> list[LinkFigures]:
        """The figures of each link, by source and target."""
        by_link: dict[tuple[int, int], list[Event]] = defaultdict(list)
        for event in self.prefill():
            if event.kind == "recv" and event.peer is not None:
                by_link[event.peer, event.rank].append(event)
        found = []
        for (source, target), events in sorted(by_link.items()):
            size = sum(event.bytes for event in events)
            wire_s = seconds(union((event.met, event.end) for event in events))
            transfer_s = median(event.busy for event in events) / 1e9
            rate = size / wire_s if wire_s > 0 else None
            found.append(LinkFigures(source, target, len(events), size, wire_s, transfer_s, rate))
        return found

    def received(self, rank: int) -> list[list[bool]]:
        """received[chunk][layer]: whether this rank has received or computed that block."""
        held = {
            (event.chunk, event.layer)
            for event in self.prefill(rank)
            if event.kind == "layer" or (event.kind == "recv" and event.what == "kv")
        }
        chunks, layers = self._map_size
        return [[(chunk, layer) in held for layer in range(layers)] for chunk in range(chunks)]

    @cached_property
    def _map_size(self) -> tuple[int, int]:
        """How many chunks and layers the known blocks have."""
        known = {(e.chunk, e.layer) for e in self.prefill() if e.kind == "layer" or e.what == "kv"}
        chunks = 1 + max((chunk for chunk, _ in known if chunk is not None), default=-1)
        layers = 1 + max((layer for _, layer in known if layer is not None), default=-1)
        return chunks, layers

    # -- figures: a cell shows them, `.figure` is plotly's, `.save("figure.html")` writes one to a file

    def plot(self) -> Plot:
        """The figure to look at first: `exposure()`. The others: `lanes()`, `latency()`, `distribution()`, `links()`,
        `by_layer()`. All raise NotPossible where plotly is missing."""
        return self.exposure()

    def exposure(self) -> Plot:
        """A bar for each rank: computing, exposed communication (on the wire, or waiting for the peer), bubble."""
        return plotted("exposure", self)

    def lanes(self) -> Plot:
        """What each lane did over time."""
        return plotted("gantt", self)

    def latency(self) -> Plot:
        """Each transfer as it arrived: its time on the wire, and its waiting for the peer."""
        return plotted("latency", self)

    def distribution(self) -> Plot:
        """For each link, the share of transfers that took no longer than a time."""
        return plotted("distribution", self)

    def links(self) -> Plot:
        """From each rank to each other: bytes, bandwidth, and the median and 99th percentile of latency."""
        return plotted("matrix", self)

    def by_layer(self) -> Plot:
        """The 99th percentile of latency by link and layer."""
        return plotted("layers", self)


def rank_table(ranks: Iterable[Mapping[str, Any]], about: Mapping[str, str] = ABOUT_RANKS) -> Table:
    """The figures of ranks, each as `RankFigures._asdict()` has them; `device` may be added. `about`: the columns."""
    found = list(ranks)
    devices = ["device"] * any("device" in rank for rank in found)
    about = {
        name: text
        for name, text in about.items()
        if name != TTFT or any(rank.get("ttft_s") for rank in found)
    }
    columns = ["rank", *devices, *about]
    rows = [
        [rank["rank"], *(rank[name] for name in devices), *(_cell(rank, column) for column in about)]
        for rank in found
    ]
    return Table(columns, rows, about=dict(about))


def _cell(rank: Mapping[str, Any], column: str) -> str:
    """`exposed sync s` is the value of `exposed_sync_s`, `sent MB` that of `sent_bytes`."""
    name, _, unit = NAMES_WATCHED.get(column, column).rpartition(" ")
    name = name.replace(" ", "_")
    if rank.get(f"{name}_s", 0) is None:
        return "-"
    return f"{rank[f'{name}_bytes'] / 1e6:.3f}" if unit == "MB" else f"{rank[f'{name}_s']:.3f}"

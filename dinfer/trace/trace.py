"""Trace: the merged events of all ranks, and the figures that views take from them. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from dinfer.trace.events import COMPUTE, Event, prefill_events
from dinfer.trace.export import export
from dinfer.trace.intervals import minus, seconds, union


class RankFigures(NamedTuple):
    """One rank's part of a run. Times in seconds of the clock, so that what lanes do at once counts once and none is
    longer than prefill; bytes are payloads, without headers.

    `prefill_s`: from the first op of the run, on any rank, to this rank's last; `compute_s`: in which it computed;
    `exposed_sync_s`: in which it moved KV and computed nothing; `waiting_s`: in which at least one lane waited for a
    peer, while others may have computed; `wire_s`: in which at least one message was on the wire; `decode_s`: computing
    new tokens; `check_s`: the check of all blocks before decode. The last two are not part of prefill.
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
class Trace:
    """Events in the order in which they ended, and a description of the run (`about`: plain values only)."""

    events: tuple[Event, ...]
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def merge(cls, by_rank: Iterable[Sequence[Event]], **about: Any) -> "Trace":
        """One trace of each rank's events, whose clocks are the same or have been aligned."""
        events = sorted(
            (event for events in by_rank for event in events), key=lambda e: (e.end, e.rank, e.lane)
        )
        return cls(tuple(events), about)

    def __repr__(self) -> str:
        """In a few lines: a trace has thousands of events."""
        lines = [f"trace of {len(self.events):,} events; .events has them, .export() writes them to a file"]
        for figures in map(self.rank_figures, self.ranks):
            lines.append(
                f"rank {figures.rank}: prefill {figures.prefill_s:.3f} s (computing {figures.compute_s:.3f} s), decode "
                f"{figures.decode_s:.3f} s; {figures.sent_bytes:,} bytes sent, {figures.received_bytes:,} received"
            )
        return "\n".join(lines)

    @property
    def ranks(self) -> list[int]:
        return sorted({event.rank for event in self.events})

    def prefill(self) -> Iterator[Event]:
        return prefill_events(self.events)

    def rank_figures(self, rank: int) -> RankFigures:
        """One rank's figures. Raises ValueError for a rank without events."""
        mine = [event for event in self.events if event.rank == rank]
        if not mine:
            raise ValueError(f"rank {rank} has no events in this trace; ranks with events: {self.ranks}.")
        prefill = [event for event in self.prefill() if event.rank == rank]
        compute = union((e.met, e.end) for e in prefill if e.kind in COMPUTE)
        sync = union((e.met, e.end) for e in prefill if e.what == "kv")
        transfers = [e for e in prefill if e.kind in ("send", "recv")]
        return RankFigures(
            rank=rank,
            prefill_s=(max((e.end for e in prefill), default=self.began) - self.began) / 1e9,
            compute_s=seconds(compute),
            exposed_sync_s=seconds(minus(sync, compute)),
            decode_s=sum(e.busy for e in mine if e.kind == "decode") / 1e9,
            waiting_s=seconds(union((e.start, e.met) for e in transfers)),
            wire_s=seconds(union((e.met, e.end) for e in transfers)),
            sent_bytes=sum(e.bytes for e in transfers if e.kind == "send"),
            received_bytes=sum(e.bytes for e in transfers if e.kind == "recv"),
            check_s=sum(e.busy for e in mine if e.kind == "check") / 1e9,
        )

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
            for event in self.prefill()
            if event.rank == rank and (event.kind == "layer" or (event.kind == "recv" and event.what == "kv"))
        }
        known = [(e.chunk, e.layer) for e in self.prefill() if e.kind == "layer" or e.what == "kv"]
        chunks = 1 + max((chunk for chunk, _ in known if chunk is not None), default=-1)
        layers = 1 + max((layer for _, layer in known if layer is not None), default=-1)
        return [[(chunk, layer) in held for layer in range(layers)] for chunk in range(chunks)]

"""What a trace of other people's code moved: over each link, and by each kind of collective, as figures and a table."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dinfer.display import Table
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import by_collective


def links_of(trace: Trace) -> list[dict[str, Any]]:
    """What went over each link, by source and target, as plain values."""
    waited: dict[tuple[int, int], float] = {}
    for event in trace.events:
        if event.kind == "recv" and event.peer is not None and event.end:
            link = (event.peer, event.rank)
            waited[link] = waited.get(link, 0.0) + event.waited / 1e9
    ended = replace(trace, events=tuple(event for event in trace.events if event.end))
    return [
        {
            "source": link.source,
            "target": link.target,
            "messages": link.transfers,
            "bytes": link.bytes,
            "seconds": round(link.wire_s, 6),
            "mb_per_s": round(link.bytes_per_s / 1e6, 3) if link.bytes_per_s else None,
            "waiting_s": round(waited.get((link.source, link.target), 0.0), 6),
        }
        for link in ended.link_figures()
    ]


def collectives_of(trace: Trace) -> list[dict[str, Any]]:
    """The collectives of each kind and group, with their bytes, seconds and waiting of all ranks together."""
    return [
        {
            "kind": kind,
            "group": group,
            "calls": len(events),
            "bytes": sum(event.bytes for event in events),
            "seconds": sum(event.busy for event in events) / 1e9,
            "waiting_s": sum(event.waited for event in events) / 1e9,
        }
        for (kind, group), events in by_collective(trace.events).items()
    ]


def table_of(trace: Trace) -> Table:
    """Links, and below them collectives."""
    rows: list[list[object]] = [
        [f"{one['source']}→{one['target']}", one["messages"], *_figures(one)] for one in links_of(trace)
    ]
    rows += [
        [f"{one['kind']} ({one['group']})", one["calls"], *_figures(one)] for one in collectives_of(trace)
    ]
    return Table(["link", "ops", "MB", "s", "MB/s", "waiting s"], rows)


def _figures(one: Mapping[str, Any]) -> list[str]:
    rate = f"{one['bytes'] / one['seconds'] / 1e6:,.1f}" if one["seconds"] else "–"
    return [f"{one['bytes'] / 1e6:,.3f}", f"{one['seconds']:.3f}", rate, f"{one['waiting_s']:.3f}"]

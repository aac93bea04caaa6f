"""Writes traces to files: JSON lines, an event a line after a first line that describes the run; and for Perfetto.

What Perfetto and Chrome read is Chromium's "Trace Event Format": ranks as processes, lanes as threads, sends as
arrows. Times are microseconds, with fractions.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dinfer.errors import DinferError
from dinfer.files import WrittenPath, make_folder
from dinfer.trace.events import COMPUTE, Event, pairs

FORMAT = "dinfer trace 1"

FORMS = {"jsonl": "trace.jsonl", "perfetto": "trace.perfetto.json"}
"""the default name of the file, by form"""


class TraceError(DinferError, ValueError):
    """A file is no trace, or only part of one."""


def write_whole(path: str | Path, pieces: Iterable[str]) -> None:
    """Write text to a file, and make the folders above it. An existing file is replaced only once all is written; no
    half-written file is left. Raises OSError."""
    target = make_folder(path)
    if target.exists() and not target.is_file():  # a device or a pipe: root would replace /dev/null by a file
        with target.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
        return
    part = target.with_name(target.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)  # a half-written file only fills the disk further
        # The user did not name the part file.
        raise OSError(error.errno, error.strerror, str(target)) from None


def export(events: Sequence[Event], about: dict[str, Any], form: str, path: str | Path | None = None) -> Path:
    """Write events in one of FORMS, and return where they are. Raises TraceError for another form, OSError."""
    if form not in FORMS:
        raise TraceError(f"a trace cannot be exported as {form!r}; it must be one of {', '.join(FORMS)}.")
    target = WrittenPath(Path(path or FORMS[form]).expanduser())
    if form == "perfetto":
        write_whole(target, [json.dumps(trace_events(events, about), ensure_ascii=False)])
    else:
        header = {"format": FORMAT, "events": len(events), "about": about}
        lines = (json.dumps(event.as_dict()) + "\n" for event in events)
        write_whole(target, chain([json.dumps(header, ensure_ascii=False) + "\n"], lines))
    return target


def trace_events(events: Sequence[Event], about: dict[str, Any]) -> dict[str, Any]:
    """The content of Perfetto's file. Time 0 is when the first op was allowed to start."""
    began = min((event.ready for event in events), default=0)
    lanes = sorted(
        {(e.rank, e.lane) for e in events}, key=lambda lane: (lane[0], lane[1] != "compute", lane[1])
    )
    threads = {lane: number for number, lane in enumerate(lanes, 1)}
    names: list[tuple[str, int, int, dict[str, Any]]] = []
    for rank in dict.fromkeys(rank for rank, _ in lanes):
        names.append(("process_name", rank, 0, {"name": f"rank {rank}"}))
        names.append(("process_sort_index", rank, 0, {"sort_index": rank}))
    for (rank, lane), number in threads.items():
        names.append(("thread_name", rank, number, {"name": lane}))
        names.append(("thread_sort_index", rank, number, {"sort_index": number}))
    made: list[dict[str, Any]] = [
        {"name": name, "ph": "M", "pid": rank, "tid": thread, "ts": 0, "args": arguments}
        for name, rank, thread, arguments in names
    ]
    ends = dict[
        int, tuple[str, int]
    ]()  # by the id() of an event: the end of an arrow, and the arrow's number
    for number, (send, recv) in enumerate(pairs(events)):
        if send and recv:
            ends[id(send)], ends[id(recv)] = ("s", number), ("f", number)
    for event in events:
        if not event.end:
            continue  # it has no length
        where = {"pid": event.rank, "tid": threads[event.rank, event.lane]}
        known = {
            name: getattr(event, name) for name in ("chunk", "layer", "peer", "tokens", "bytes", "index")
        }
        arguments = {name: value for name, value in known.items() if value is not None}
        parts = [(f"wait: {event.name}", "wait", event.start, event.waited)] * (event.waited > 0)
        parts.append((event.name, "compute" if event.kind in COMPUTE else "transfer", event.met, event.busy))
        for name, category, start, long in parts:
            times = {"ts": (start - began) / 1e3, "dur": long / 1e3}
            made.append({"name": name, "cat": category, "ph": "X", **times, **where, "args": arguments})
        if id(event) in ends:
            # A reader assigns the end of an arrow to the slice that began last on its thread by then, in the order of
            # times and then of the file. So it follows its slice, before anything that begins where the slice ends.
            phase, number = ends[id(event)]
            time = event.met if phase == "s" else max(event.met, event.end - 1)
            arrow = {"name": event.what or "transfer", "cat": "flow", "ph": phase, "id": number, "bp": "e"}
            made.append({**arrow, **where, "ts": (time - began) / 1e3})
    return {"traceEvents": made, "displayTimeUnit": "ms", "otherData": about}

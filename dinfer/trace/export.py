"""Traces as files: JSON lines, one event a line after a first line that describes the run; and for Perfetto."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from dinfer.errors import DinferError
from dinfer.trace.events import Event
from dinfer.trace.files import write_whole
from dinfer.trace.perfetto import trace_events
from dinfer.trace.trace import Trace

FORMAT = "dinfer trace 1"


class TraceError(DinferError, ValueError):
    """A file that is not a trace, or only part of one."""


def export(trace: Trace, form: str, path: str | Path | None = None) -> Path:
    """Write the trace in one of FORMS; where it is. Raises TraceError for another form, OSError."""
    if form not in FORMS:
        raise TraceError(f"a trace cannot be exported as {form!r}; it must be one of {', '.join(FORMS)}.")
    name, write = FORMS[form]
    target = Path(path or name)
    write(trace, target)
    return target


def write_jsonl(trace: Trace, path: str | Path) -> None:
    """Write the trace; an existing file is replaced only once all is written."""
    header = {"format": FORMAT, "events": len(trace.events), "about": trace.about}
    lines = (json.dumps(event.as_dict()) + "\n" for event in trace.events)
    write_whole(path, chain([json.dumps(header, ensure_ascii=False) + "\n"], lines))


def write_perfetto(trace: Trace, path: str | Path) -> None:
    """Write the trace as trace-event JSON, replacing a file only once all is written."""
    write_whole(path, [json.dumps(trace_events(trace), ensure_ascii=False)])


FORMS: dict[str, tuple[str, Callable[[Trace, Path], None]]] = {
    "jsonl": ("trace.jsonl", write_jsonl),
    "perfetto": ("trace.perfetto.json", write_perfetto),
}
"""by name: the file's default name, and what writes it"""


def read_jsonl(path: str | Path) -> Trace:
    """The trace in a file that `write_jsonl`, or another program, wrote. Raises TraceError."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            header = json.loads(file.readline())
            known = isinstance(header, dict) and header.get("format") == FORMAT
            events = tuple(Event(**json.loads(line)) for line in file) if known else ()
    except (ValueError, TypeError) as error:  # not JSON, not UTF-8, or a line that is no event
        raise TraceError(f"{str(path)!r} is not a trace, or a damaged one: {error}.") from None
    if not known:
        raise TraceError(f"{str(path)!r} is not a trace: its first line does not say {FORMAT!r}.")
    expected = header.get("events", len(events))
    if expected != len(events):
        raise TraceError(f"{str(path)!r} holds {len(events)} of {expected} events: it was cut short.")
    return Trace(events, header.get("about", {}))

"""Reads traces from files: JSON lines as `export` writes them, and the traces embedded in a report."""

import json
from pathlib import Path

from dinfer.trace.embedded import embedded_traces
from dinfer.trace.events import Event
from dinfer.trace.export import FORMAT, TraceError
from dinfer.trace.trace import Trace


def read_jsonl(path: str | Path) -> Trace:
    """The trace in a file that `write_jsonl` or another program has written. Raises TraceError."""
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


def read_traces(path: str | Path) -> list[Trace]:
    """The traces in a report, or the one in a trace file. Raises TraceError, and OSError if there is no such file."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        return [read_jsonl(path)]
    try:
        traces = embedded_traces(Path(path).read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise TraceError(f"{str(path)!r} holds a damaged trace: {type(error).__name__}: {error}.") from None
    if not traces:
        raise TraceError(
            f"{str(path)!r} holds no trace: it is no report of dinfer, or one of another version."
        )
    return traces

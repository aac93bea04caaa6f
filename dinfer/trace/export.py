"""Traces as files: JSON lines, one event a line after a first line that describes the run."""

import json
from pathlib import Path

from dinfer.trace.events import Event
from dinfer.trace.trace import Trace

FORMAT = "dinfer trace 1"


class TraceError(ValueError):
    """A file that is not a trace, or only part of one."""


def write_jsonl(trace: Trace, path: str | Path) -> None:
    """Write the trace; an existing file is replaced only once all is written."""
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            header = {"format": FORMAT, "events": len(trace.events), "about": trace.about}
            file.write(json.dumps(header, ensure_ascii=False) + "\n")
            file.writelines(json.dumps(event.as_dict()) + "\n" for event in trace.events)
        part.replace(target)
    except OSError:
        part.unlink(missing_ok=True)  # half a trace on a full disk helps nobody
        raise


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

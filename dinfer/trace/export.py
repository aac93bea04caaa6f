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
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": FORMAT, "events": len(trace.events), **trace.about}, ensure_ascii=False) + "\n")
        file.writelines(json.dumps(event.as_dict()) + "\n" for event in trace.events)
    part.replace(target)


def read_jsonl(path: str | Path) -> Trace:
    """The trace in a file that `write_jsonl`, or another program, wrote. Raises TraceError."""
    with Path(path).open(encoding="utf-8") as file:
        try:
            about = json.loads(file.readline())
            if about.pop("format", None) != FORMAT:
                raise TraceError(f"{str(path)!r} is not a trace: its first line does not say {FORMAT!r}.")
            expected = about.pop("events", None)
            events = tuple(Event(**json.loads(line)) for line in file)
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise TraceError(f"{str(path)!r} is not a trace, or a damaged one: {error}.") from None
    if expected is not None and expected != len(events):
        raise TraceError(f"{str(path)!r} holds {len(events)} of {expected} events: it was cut short.")
    return Trace(events, about)

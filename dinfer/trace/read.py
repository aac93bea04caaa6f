"""Reads traces from files: JSON lines as `export` writes them, and the traces in a report.

A report holds its traces as JSON that browsers do not run. To be short, each field of the events is a column.
"""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from dinfer.trace.events import Event
from dinfer.trace.export import FORMAT, TraceError
from dinfer.trace.trace import Trace

IN_COLUMNS = "dinfer trace in columns 1"

ELEMENT = "dinfer-trace"
"""the element's id is this, a hyphen and a number"""

_ELEMENTS = re.compile(rf'<script type="application/json" id="{ELEMENT}-\d+">(.*?)</script>', re.DOTALL)

_FIELDS = [item.name for item in fields(Event)]

_TIMES = ("ready", "start", "met", "end")

_WORDS = ("lane", "kind", "what")


def read_jsonl(path: str | Path) -> Trace:
    """The trace in a file that `Trace.export` or another program has written. Raises TraceError."""
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
        found = map(json.loads, _ELEMENTS.findall(Path(path).read_text(encoding="utf-8")))
        traces = [of_columns(values) for values in found if values["format"] == IN_COLUMNS]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise TraceError(f"{str(path)!r} holds a damaged trace: {type(error).__name__}: {error}.") from None
    if not traces:
        raise TraceError(
            f"{str(path)!r} holds no trace: it is no report of dinfer, or one of another version."
        )
    return traces


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: it contains nothing that could end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def as_columns(trace: Trace) -> dict[str, Any]:
    """The trace as plain values. Times count from the start of the run; words are replaced by numbers."""
    began = min((event.ready for event in trace.events), default=0)
    columns: dict[str, Any] = {name: [getattr(event, name) for event in trace.events] for name in _FIELDS}
    for name in _TIMES:
        columns[name] = [time - began for time in columns[name]]
    words = {name: sorted(set(columns[name])) for name in _WORDS}
    for name in _WORDS:
        numbers = {word: number for number, word in enumerate(words[name])}
        columns[name] = [numbers[word] for word in columns[name]]
    return {"format": IN_COLUMNS, "about": trace.about, "began": began, "words": words, "columns": columns}


def of_columns(values: dict[str, Any]) -> Trace:
    """The inverse of `as_columns`."""
    columns = dict(values["columns"])
    for name in _TIMES:
        columns[name] = [time + values["began"] for time in columns[name]]
    for name in _WORDS:
        columns[name] = [values["words"][name][number] for number in columns[name]]
    rows = zip(*(columns[name] for name in _FIELDS), strict=True)
    return Trace(tuple(Event(*row) for row in rows), values["about"])

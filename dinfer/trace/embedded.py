"""Traces inside a web page, as JSON that browsers do not run, and back. To be short, each field is a column."""

import json
import re
from dataclasses import fields
from typing import Any

from dinfer.trace.events import Event
from dinfer.trace.trace import Trace

FORMAT = "dinfer trace in columns 1"

ELEMENT = "dinfer-trace"
"""the element's id is this, a hyphen and a number"""

_FIELDS = [item.name for item in fields(Event)]

_TIMES = ("ready", "start", "met", "end")

_WORDS = ("lane", "kind", "what")

_ELEMENTS = re.compile(rf'<script type="application/json" id="{ELEMENT}-\d+">(.*?)</script>', re.DOTALL)


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
    return {"format": FORMAT, "about": trace.about, "began": began, "words": words, "columns": columns}


def of_columns(values: dict[str, Any]) -> Trace:
    """The inverse of `as_columns`."""
    columns = dict(values["columns"])
    for name in _TIMES:
        columns[name] = [time + values["began"] for time in columns[name]]
    for name in _WORDS:
        columns[name] = [values["words"][name][number] for number in columns[name]]
    rows = zip(*(columns[name] for name in _FIELDS), strict=True)
    return Trace(tuple(Event(**dict(zip(_FIELDS, row, strict=True))) for row in rows), values["about"])


def embedded_traces(page: str) -> list[Trace]:
    """The traces in a web page. Raises ValueError, TypeError, KeyError or IndexError for a damaged page."""
    found = [json.loads(text) for text in _ELEMENTS.findall(page)]
    return [of_columns(values) for values in found if values["format"] == FORMAT]

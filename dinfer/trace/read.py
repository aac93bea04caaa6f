"""Reads traces from files: JSON lines as `export` writes them, and the traces in a report.

A report holds its traces as JSON that browsers do not run. To be short, each field of the events is a column.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from math import inf, prod
from pathlib import Path
from types import GenericAlias
from typing import Any, get_type_hints

import msgspec

from dinfer.errors import excerpt
from dinfer.trace.events import Event
from dinfer.trace.export import FORMAT, TraceError
from dinfer.trace.findings import KEY, Findings
from dinfer.trace.trace import Trace

IN_COLUMNS = "dinfer trace in columns 1"

ELEMENT = "dinfer-trace"
"""the element's id is this, a hyphen and a number"""

_ELEMENT = re.compile(rf'<script type="application/json" id="{ELEMENT}-[0-9]{{1,9}}">')

_FIELDS = [item.name for item in fields(Event)]

_COLUMNS = {name: GenericAlias(list, hint) for name, hint in get_type_hints(Event).items()}

_TIMES = ("ready", "start", "met", "end")

_WORDS = ("lane", "kind", "what")


_LARGEST = {
    "rank": 9_999,
    "peer": 9_999,
    "layer": 99_999,
    "chunk": 9_999_999,
    "tokens": 1 << 40,
    "bytes": 1 << 60,
}
_LONGEST_NS = 1 << 62  # in nanoseconds, a century and a half

MAX_CELLS = 20_000_000
"""layers × chunks × ranks; views draw no larger map"""

DAMAGED = (ValueError, msgspec.MsgspecError, TypeError, RecursionError)
"""what reading raises of a file that is no trace; the errors of older msgspecs are no ValueError"""

_event = msgspec.json.Decoder(Event)


def read_jsonl(path: str | Path) -> Trace:
    """The trace in a file that `Trace.export` or another program has written. Every field is checked as it is read.
    Raises TraceError, which names the line."""
    number, events = 1, list[Event]()
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            header = json.loads(file.readline())
            known = isinstance(header, dict) and header.get("format") == FORMAT
            for line in file if known else ():
                number += 1
                events.append(_event.decode(line))
                _check_event(events[-1])
        number = 1
        if known:
            _check_sizes(header.get("about", {}), events)
    except DAMAGED as error:  # not JSON, not UTF-8, or a line that is no event
        raise TraceError(f"{str(path)!r} is not a trace, or a damaged one: line {number}: {error}.") from None
    if not known:
        raise TraceError(f"{str(path)!r} is not a trace: its first line does not say {FORMAT!r}.")
    expected = header.get("events", len(events))
    if expected != len(events):
        raise TraceError(f"{str(path)!r} holds {len(events)} of {expected} events: it was cut short.")
    return Trace(tuple(events), header.get("about", {}))


def _check_event(event: Event) -> None:
    """Raises ValueError for a field out of range."""
    if not _is_in_range(event):
        _check_fields(event)


def _is_in_range(e: Event) -> bool:
    """Whether all fields are as in almost every event; fast, as a trace has a million."""
    return (
        0 <= e.ready <= e.start <= e.end <= _LONGEST_NS
        and 0 <= e.met <= _LONGEST_NS
        and 0 <= e.rank <= _LARGEST["rank"]
        and (e.peer is None or 0 <= e.peer <= _LARGEST["peer"])
        and (e.layer is None or 0 <= e.layer <= _LARGEST["layer"])
        and (e.chunk is None or 0 <= e.chunk <= _LARGEST["chunk"])
        and 0 <= e.tokens <= _LARGEST["tokens"]
        and 0 <= e.bytes <= _LARGEST["bytes"]
    )


def _check_fields(event: Event) -> None:
    """Raises ValueError for the first field out of range."""
    for name, largest in _LARGEST.items():
        value = getattr(event, name)
        if value is not None and not 0 <= value <= largest:
            raise ValueError(f"{name} is {value}; it must be from 0 to {largest:,}")
    times = {name: getattr(event, name) for name in _TIMES}
    if min(times.values()) < 0 or max(times.values()) > _LONGEST_NS:
        raise ValueError(f"its times are {times}; they must be nanoseconds, at least 0")
    if (
        event.end and not event.ready <= event.start <= event.end
    ):  # `met` is another rank's clock, and may be off
        raise ValueError(f"its times are {times}; it must be ready, start and end in this order")


def _check_sizes(about: Any, events: Sequence[Event]) -> None:
    """Raises ValueError for a description that is none, or sizes that no run has, as one wrong number makes them."""
    if not isinstance(about, dict):
        raise ValueError(f"about is {excerpt(about)}; it must be an object")
    Findings.of(about.get(KEY, {}))
    for name in ("layers", "tokens", "chunk_size", "world_size", "threads"):
        value = about.get(name)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value < 1 << 40):
            raise ValueError(f"{name} is {excerpt(value)}; it must be a whole number, at least 0")
    lengths = about.get("chunks", [])
    if not isinstance(lengths, list) or not all(type(length) is int and length > 0 for length in lengths):
        raise ValueError(f"chunks is {excerpt(lengths)}; it must be a list of whole numbers, each at least 1")
    predicted_s = about.get("predicted_s", 1.0)
    if type(predicted_s) not in (int, float) or not 0 < predicted_s < inf:
        raise ValueError(f"predicted_s is {excerpt(predicted_s)}; it must be a number of seconds, above 0")
    for name in ("schedule", "sync_strategy", "codec", "plan_id"):
        if not isinstance(about.get(name, ""), str | None):
            raise ValueError(f"{name} is {excerpt(about[name])}; it must be text")
    chunks = len(lengths) or -(-(about.get("tokens") or 0) // (about.get("chunk_size") or 1))
    sizes = {
        "layers": max([about.get("layers") or 1, *(e.layer + 1 for e in events if e.layer is not None)]),
        "chunks": max([chunks, 1, *(e.chunk + 1 for e in events if e.chunk is not None)]),
        "ranks": max([about.get("world_size") or 1, *(e.rank + 1 for e in events)]),
    }
    if prod(sizes.values()) > MAX_CELLS:
        named = ", ".join(f"{size:,} {name}" for name, size in sizes.items())
        raise ValueError(
            f"it would have {named}: more than {MAX_CELLS:,} blocks. One of these numbers must be wrong"
        )


def read_traces(path: str | Path) -> list[Trace]:
    """The traces in a report, or the one in a trace file. Raises TraceError, and OSError if there is no such file."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        return [read_jsonl(path)]
    try:
        found = map(json.loads, _elements(Path(path).read_text(encoding="utf-8-sig")))
        traces = [of_columns(values) for values in found if values["format"] == IN_COLUMNS]
    except (*DAMAGED, KeyError, IndexError, AttributeError) as error:
        raise TraceError(f"{str(path)!r} holds a damaged trace: {type(error).__name__}: {error}.") from None
    if not traces:
        raise TraceError(
            f"{str(path)!r} holds no trace: it is no report of dinfer, or one of another version."
        )
    return traces


def _elements(page: str) -> Iterator[str]:
    """The contents of the elements with traces."""
    at = 0
    while element := _ELEMENT.search(page, at):
        at = page.index("</script>", element.end())
        yield page[element.end() : at]


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
    calls = [call and asdict(call) for call in columns.pop("call")]
    if any(calls):
        columns["call"] = calls
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
    columns.setdefault("call", [None] * len(columns["rank"]))
    for name in _TIMES:
        columns[name] = [time + values["began"] for time in columns[name]]
    for name in _WORDS:
        columns[name] = [values["words"][name][number] for number in columns[name]]
    typed = [msgspec.convert(columns[name], _COLUMNS[name]) for name in _FIELDS]
    if len(set(map(len, typed))) > 1:
        raise ValueError("its columns are of different lengths")
    events = tuple(map(Event, *typed))
    for event in events:
        _check_event(event)
    _check_sizes(values["about"], events)
    return Trace(events, values["about"])

"""Writes traces to files: JSON lines, an event a line after a first line that describes the run; and for Perfetto."""

import errno
import json
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

from dinfer.errors import DinferError
from dinfer.trace.events import EventLog
from dinfer.trace.perfetto import trace_events


def check_folder(path: str | Path) -> None:
    """Raises FileNotFoundError or NotADirectoryError if the file's folder does not exist, or is no folder."""
    folder = Path(path).absolute().parent
    if not folder.exists():
        raise FileNotFoundError(errno.ENOENT, f"the folder {str(folder)!r} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{str(folder)!r} is no folder")


def write_whole(path: str | Path, pieces: Iterable[str]) -> None:
    """Write text to a file. An existing file is replaced only once all is written; no half-written file is left. Raises
    OSError."""
    target = Path(path)
    check_folder(target)
    part = target.with_name(target.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)  # a half-written file only fills the disk further
        raise OSError(
            error.errno, error.strerror, str(target)
        ) from None  # the user did not name the part file


FORMAT = "dinfer trace 1"


class TraceError(DinferError, ValueError):
    """A file is no trace, or only part of one."""


def export(trace: EventLog, form: str, path: str | Path | None = None) -> Path:
    """Write the trace in one of FORMS, and return where it is. Raises TraceError for another form, OSError."""
    if form not in FORMS:
        raise TraceError(f"a trace cannot be exported as {form!r}; it must be one of {', '.join(FORMS)}.")
    name, write = FORMS[form]
    target = Path(path or name)
    write(trace, target)
    return target


def write_jsonl(trace: EventLog, path: str | Path) -> None:
    """Write the trace as JSON lines, as `write_whole` does."""
    header = {"format": FORMAT, "events": len(trace.events), "about": trace.about}
    lines = (json.dumps(event.as_dict()) + "\n" for event in trace.events)
    write_whole(path, chain([json.dumps(header, ensure_ascii=False) + "\n"], lines))


def write_perfetto(trace: EventLog, path: str | Path) -> None:
    """Write the trace as trace-event JSON, as `write_whole` does."""
    write_whole(path, [json.dumps(trace_events(trace), ensure_ascii=False)])


FORMS: dict[str, tuple[str, Callable[[EventLog, Path], None]]] = {
    "jsonl": ("trace.jsonl", write_jsonl),
    "perfetto": ("trace.perfetto.json", write_perfetto),
}
"""by form: the default name of the file, and its writer"""

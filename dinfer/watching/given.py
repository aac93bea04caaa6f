"""The evidence in what a user gives: folders of watched processes, flight-recorder dumps, or a trace."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dinfer.errors import DinferError
from dinfer.trace.export import TraceError
from dinfer.trace.flight import is_dump, read_dumps
from dinfer.trace.read import read_traces
from dinfer.trace.trace import Trace
from dinfer.watching.evidence import JOB, NOW, SIGNS, Evidence
from dinfer.watching.failures import before_they_were_killed
from dinfer.watching.folders import RECORDS, Watched
from dinfer.watching.signs import of_plain


class ExplainError(DinferError, ValueError):
    """There is nothing to explain in what was given."""


def read(paths: Sequence[str | Path]) -> list[Evidence]:
    """The evidence in watch folders, flight-recorder dumps or folders of these, or one trace: of each job that is in
    it. Raises ExplainError, TraceError, OSError."""
    given = [Path(path) for path in paths]
    for path in given:
        path.stat()  # raises where there is nothing
    given = [path / RECORDS if (path / RECORDS).is_dir() else path for path in given]
    given = list({path.resolve(): path for path in given}.values())
    folders = [path for path in given if path.is_dir() and any(path.glob("*.ops"))]
    if folders:
        return _of_folders(folders, [path for path in given if path not in folders])
    files = list({path.resolve(): path for one in given for path in _files(one)}.values())
    dumps = [path for path in files if is_dump(path)]
    if dumps:
        return [_of_dumps(dumps)]
    traces = [path for path in files if path.suffix in (".jsonl", ".html", ".htm")]
    if len(traces) != 1:
        what = "no watch folder, flight-recorder dump or trace" if not traces else f"{len(traces)} traces"
        raise ExplainError(
            f"there is {what} in {', '.join(map(str, paths))}: give folders of `dinfer watch`, dumps, or one trace."
        )
    return [of_trace(read_traces(traces[0])[0])]


def _of_dumps(dumps: list[Path]) -> Evidence:
    """What the dumps that can be read say. Raises TraceError where none can."""
    readable, notes = list[Path](), list[str]()
    for path in dumps:
        try:
            read_dumps([path])
            readable.append(path)
        except (TraceError, OSError) as error:
            notes.append(str(error).removesuffix("."))
    if not readable:
        raise TraceError(f"{'; '.join(notes)}.")
    return Evidence(read_dumps(readable), notes=tuple(notes))


def _of_folders(folders: list[Path], others: list[Path]) -> list[Evidence]:
    if others:
        raise ExplainError(
            f"{others[0]} is no folder of watched processes, as {folders[0]} is: explain it by itself."
        )
    watched = Watched(folders)
    jobs = watched.look()
    if not any(found.processes for found in jobs) and watched.unreadable:
        raise ExplainError(f"cannot read what was watched: {'; '.join(watched.unreadable)}.")
    records = watched.look(live=False)  # processes of other hosts, and copies of a record, cannot be asked
    kv = [watched.kv(found) for found in jobs]  # of which a part may not be readable, too
    notes = tuple(watched.unreadable)
    return [
        replace(judged, kv=rows, notes=tuple(dict.fromkeys((*judged.notes, *notes))))
        for judged, rows in zip(map(_judged, jobs, records), kv, strict=False)
    ]


def _judged(found: Evidence, record: Evidence) -> Evidence:
    """The evidence of a job as it is now, as it was before it was killed, or as its record has it."""
    if (earlier := before_they_were_killed(found)) is not found:
        return earlier
    ended = [found.processes[rank].ended is not None or found.signs[rank].ended for rank in found.processes]
    if all(ended):
        return found
    here = any(its.cpu_moves is not None or its.answers for its in found.signs.values())
    return found if here else record


def of_trace(trace: Trace) -> Evidence:
    """The evidence that a trace holds: of `dinfer watch`, of dinfer's own runs, or of other programs. Raises
    TraceError."""
    try:
        signs = of_plain(trace.about.get(SIGNS, {}))
        now = trace.about.get(NOW)
        now_ns = int(now) if now is not None else None
        return Evidence(trace, signs, now_ns, job=str(trace.about.get(JOB, "")))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise TraceError(f"the trace's signs of life are damaged: {type(error).__name__}: {error}.") from None


def _files(path: Path) -> list[Path]:
    return sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]

"""The evidence in what a user gives: folders of watched processes, flight-recorder dumps, or a trace."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from dinfer.errors import DinferError
from dinfer.trace.export import TraceError
from dinfer.trace.flight import is_dump, read_dumps
from dinfer.trace.read import read_traces
from dinfer.trace.trace import Trace
from dinfer.watching.evidence import NOW, SIGNS, Evidence
from dinfer.watching.failures import before_they_were_killed
from dinfer.watching.folders import Watched
from dinfer.watching.signs import of_plain


class ExplainError(DinferError, ValueError):
    """There is nothing to explain in what was given."""


def read(paths: Sequence[str | Path]) -> Evidence:
    """The evidence in watch folders, flight-recorder dumps or folders of these, or one trace. Raises ExplainError,
    TraceError, OSError."""
    given = [Path(path) for path in paths]
    for path in given:
        path.stat()  # raises where there is nothing
    folders = [path for path in given if path.is_dir() and any(path.glob("*.ops"))]
    if folders:
        return _of_folders(folders, [path for path in given if path not in folders])
    files = list(chain.from_iterable(_files(path) for path in given))
    dumps = [path for path in files if is_dump(path)]
    if dumps:
        return Evidence(read_dumps(dumps))
    traces = [path for path in files if path.suffix in (".jsonl", ".html", ".htm")]
    if len(traces) != 1:
        what = "no watch folder, flight-recorder dump or trace" if not traces else f"{len(traces)} traces"
        raise ExplainError(
            f"there is {what} in {', '.join(map(str, paths))}: give folders of `dinfer watch`, dumps, or one trace."
        )
    return of_trace(read_traces(traces[0])[0])


def _of_folders(folders: list[Path], others: list[Path]) -> Evidence:
    if others:
        raise ExplainError(
            f"{others[0]} is no folder of watched processes, as {folders[0]} is: explain it by itself."
        )
    watched = Watched(folders)
    found = watched.look()
    found = replace(found, rows=watched.rows())
    if watched.unreadable:
        raise ExplainError(f"cannot read what was watched: {'; '.join(watched.unreadable)}.")
    if not any(
        found.processes[rank].ended is None and not found.signs[rank].ended for rank in found.processes
    ):
        return before_they_were_killed(found)
    here = {rank for rank, its in found.signs.items() if its.cpu_moves is not None or its.answers}
    # Processes of other hosts, and copies of a record, cannot be asked: the record is all.
    return found if here else replace(watched.look(live=False), now_ns=None, rows=found.rows)


def of_trace(trace: Trace) -> Evidence:
    """The evidence that a trace holds: of `dinfer watch`, of dinfer's own runs, or of other programs. Raises
    TraceError."""
    try:
        signs = of_plain(trace.about.get(SIGNS, {}))
        now = trace.about.get(NOW)
        return Evidence(trace, signs, int(now) if now is not None else None)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise TraceError(f"the trace's signs of life are damaged: {type(error).__name__}: {error}.") from None


def _files(path: Path) -> list[Path]:
    return sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]

"""The runs of a session: the current one, and those before it, which answer from what was kept of them."""

import threading
from collections.abc import Iterable, Iterator, Sequence

from dinfer.arguments import nearest
from dinfer.display import Composed, Displayable, Table, Tidy
from dinfer.errors import NoSuch, excerpt
from dinfer.run.comparison import RunComparison, compare_runs, figures_of, side_of
from dinfer.run.kept import size_text
from dinfer.run.run import Run
from dinfer.severity import Severity
from dinfer.tabular import TableRow, Tabular
from dinfer.trace.summary import chunks_text

KEPT = 8
"""how many runs are kept, by default"""

MOST_BYTES = 1 << 30
"""of digests of all runs together: the oldest runs are dropped where there are more"""

ABOUT = {
    "run": "its name: session.runs[3], or session.runs['run 3']",
    "state": "where it stands, or stood when it was over",
    "tokens": "of the prompt, and how many to a chunk",
    "schedule": "how ops are laid on lanes",
    "strategy": "who passes blocks to whom",
    "new": "new tokens",
    "prefill, s": "from the first op on any rank to the last",
    "exposed": "share of prefill in which a rank computed nothing while data was on its way",
    "verdict": "how it ended, and what is odd about it",
    "kept": "what answers once the run is over: digests of its KV in memory, or its values in a temporary folder",
}
"""columns, and what they mean"""


class SessionRuns(Tidy, Tabular, Composed, called="session.runs"):
    """The last runs of a session, oldest first: `session.runs[3]` or `session.runs["run 3"]` is a run by its number,
    `session.runs[-1]` the newest, `session.runs.compare(2, 3)` two of them side by side.

    Of a run that is over, everything still answers but what needs values: its trace, position, verdict, tokens, report,
    `kv().diff()` and `compare(other)` by digests, `save` without values. After `prefill(…, keep=True)` values do, too.
    `limit`: how many are kept; older ones are dropped, and so are the oldest where the digests of all are above 1 GiB.
    A run that a variable still holds goes on answering.
    """

    INTERNAL = frozenset({"add", "lines", "trim"})

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[int, Run] = {}
        self._count = 0
        self._limit = KEPT
        self._lines: dict[int, tuple[str, ...]] = {}
        """of runs that are over: they do not change any more"""

    @property
    def limit(self) -> int:
        """How many runs are kept, 8 at first; it may be set."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise NoSuch(f"limit is {excerpt(limit)}; it must be a whole number of runs, at least 1.")
        self._limit = limit
        self.trim()

    def __iter__(self) -> Iterator[Run]:
        with self._lock:
            return iter(list(self._runs.values()))

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, which: int | str) -> Run:
        """By number, by name, or from the newest on by −1, −2, … Raises NoSuch, a KeyError, for a run that is not
        there, or was dropped."""
        with self._lock:
            runs, count = dict(self._runs), self._count
        names = {run.name: number for number, run in runs.items()}
        number = which
        if isinstance(which, str):
            last = which.removeprefix("run ").strip()
            number = int(last) if last.isdecimal() else 0
        if isinstance(number, int) and -len(runs) <= number < 0:
            return list(runs.values())[number]
        if isinstance(number, int) and number in runs:
            return runs[number]
        there = (
            f"there are {', '.join(names)}" if names else "there is none yet: session.prefill(…) makes one"
        )
        if isinstance(number, int) and 0 < number <= count:
            raise NoSuch(
                f"run {number} was dropped, since the last {self._limit} are kept (session.runs.limit = {number + 8} "
                f"keeps more of those to come); {there}."
            )
        hint = nearest(which, names) if isinstance(which, str) else ""
        raise NoSuch(f"there is no run {excerpt(which)}; {there}.{hint}")

    def compare(self, one: int | str, other: int | str) -> RunComparison:
        """Two of these runs side by side: see `run.compare(other_run)`. Raises NoSuch."""
        return compare_runs(self[one], self[other])

    def table(self) -> Table:
        """A row for each run, oldest first."""
        return Table(tuple(ABOUT), self.lines(), about=ABOUT)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        return self.table()._tabulated()

    def _parts(self) -> Iterable[str | Displayable]:
        if not len(self):
            yield "no runs yet: session.prefill(…) makes one"
            return
        yield self.table()
        dropped = self._count - len(self)
        yield f"{dropped} older run{'s were' if dropped > 1 else ' was'} dropped" if dropped else ""

    # -- for the session and views

    def add(self, run: Run) -> None:
        """A new run has begun."""
        with self._lock:
            self._count += 1
            run.name = f"run {self._count}"
            self._runs[self._count] = run
        self.trim()

    def trim(self) -> None:
        """Drop the oldest where there are too many, or their digests are too large."""
        with self._lock:
            while len(self._runs) > 1 and (len(self._runs) > self._limit or self._nbytes() > MOST_BYTES):
                oldest = next(iter(self._runs))
                del self._runs[oldest]
                self._lines.pop(oldest, None)

    def lines(self) -> list[tuple[str, ...]]:
        """The cells of each run, in the order of ABOUT."""
        with self._lock:
            runs = dict(self._runs)
        return [self._line(number, run) for number, run in runs.items()]

    def _nbytes(self) -> int:
        kept = (run.kept for run in self._runs.values())
        return sum(one.nbytes for one in kept if one and not one.folder)

    def _line(self, number: int, run: Run) -> tuple[str, ...]:
        with self._lock:
            if number in self._lines:
                return self._lines[number]
        is_over = bool(run.closed)  # before its cells are made, which may be those of before it was
        line = _cells(run)
        with self._lock:
            if is_over and number in self._runs:
                self._lines[number] = line
        return line


def _cells(run: Run) -> tuple[str, ...]:
    last, side = run.last_standing(), side_of(run)
    figures, plan = figures_of(side), run.plan
    prefill_s = figures["prefill_s"]
    return (
        run.name,
        str(last.state),
        f"{plan.shape.tokens:,} by {chunks_text(side.trace.about)}",
        plan.schedule,
        plan.sync_strategy,
        str(len(run.tokens)),
        "–" if prefill_s is None else f"{prefill_s:.3f}",
        "–" if prefill_s is None else f"{100 * figures['exposed']:.0f} %",
        _verdict(run),
        _kept(run),
    )


def _verdict(run: Run) -> str:
    """What is odd about a run, in one line; empty where nothing is known to be."""
    last = run.last_standing()
    found = [last.message.partition("\n")[0]] * (last.state.severity > Severity.NOTE)
    found += [f"not finite: {last.nonfinite}"] * bool(last.nonfinite)
    found += [f"{len(run.corrupt)} block{'s' * (len(run.corrupt) > 1)} with changed bytes"] * bool(
        run.corrupt
    )
    differs = len({(mark.chunk, mark.layer) for mark in last.marks if mark.kind == "differs"})
    found += [f"{differs} block{'s differ' if differs > 1 else ' differs'} between ranks"] * bool(differs)
    found += [f"{len(last.faults)} fault{'s' * (len(last.faults) > 1)} armed"] * bool(last.faults)
    found += ["edited by hand"] * bool(run.edited)
    return "; ".join(found) or "nothing odd"


def _kept(run: Run) -> str:
    if not run.closed:
        return "on the ranks"
    if run.kept is None:
        return "trace"
    return f"{'values' if run.kept.folder else 'digests'}, {size_text(run.kept.nbytes)}"

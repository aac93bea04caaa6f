"""What a notebook holds of a run under watch: of a command that it has started, or of the engines of a cluster."""

import shlex
import shutil
import signal
import subprocess
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from dinfer.display import Closing, Displayable, DisplayableText, Table, Tidy, print_under_cell
from dinfer.errors import DinferError, NotPossible
from dinfer.files import check_report, free_path
from dinfer.severity import Severity
from dinfer.trace.trace import Trace
from dinfer.verdict.completed import OpFinding
from dinfer.verdict.verdict import Verdict
from dinfer.watch.probe.records import RaisedError
from dinfer.watch.probe.tensors import COMPARE_VARIABLE
from dinfer.watching.alarm import HangAlarm, is_end
from dinfer.watching.command import WatchedCommand, exit_status, found, not_found
from dinfer.watching.evidence import Evidence
from dinfer.watching.figures import table_of
from dinfer.watching.folders import RECORDS, Watched
from dinfer.watching.kv import WatchedKv
from dinfer.watching.pace import GLANCE_S, Pace
from dinfer.watching.signs import MAIN
from dinfer.watching.temporary import TemporaryFolder

if TYPE_CHECKING:
    from dinfer.saved.saved import WriteReport
    from dinfer.watching.comparison import WatchedComparison

TRACE = "trace.jsonl"
"""in the folder that `save` writes"""

STOP_S = 40.0
"""for so long a command may take to end by itself once it was told to"""

LOOK_S = 0.5

NO_VIEWS = "{what} need dinfer's views: make the watch by dinfer.watch(…) or session.watch()."


class WatchHung(DinferError, RuntimeError):
    """The command will not end by itself. `verdict` says why; it runs on until `close`."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(f"{verdict.sentence}; the command runs on: .close() ends it.")
        self.verdict = verdict


class WatchMoment(NamedTuple):
    """What a panel shows of a watch. `verdict`: that which stands; None if the run goes on."""

    title: str
    evidence: Evidence
    verdict: Verdict | None

    def text(self, findings: Sequence[OpFinding]) -> str:
        """What each rank does, a line each; the verdict; the first of these findings."""
        lines = self.evidence.rank_lines
        if self.verdict:
            lines.append(self.verdict.severity.marked(self.verdict.sentence))
        return "\n".join([*lines, *(Severity.WARNING.marked(one.text) for one in findings[:5])])


ShowWatch = Callable[["Watch"], Any]
"""makes the panel that `debugger` returns"""


class WatchSource(Protocol):
    """Where evidence comes from."""

    watched: Watched

    @property
    def evidence(self) -> Evidence: ...

    @property
    def whole(self) -> Evidence: ...

    @property
    def verdict(self) -> Verdict | None: ...


class Watch(Tidy, Displayable, Closing):
    """Other people's code under watch: what each rank does, why it does not move, and what it sent and received."""

    INTERNAL = frozenset({"ask_stacks", "is_over", "moment"})

    def __init__(
        self, source: WatchSource, write: "WriteReport | None" = None, show: "ShowWatch | None" = None
    ) -> None:
        self._source, self._write, self._show = source, write, show

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether nothing will change any more."""

    def moment(self) -> WatchMoment:
        """What there is to show now; of KV, what can be read at once."""
        found = self._source.evidence  # looking may end a verdict that stood
        if not found.kv.layers:
            found = replace(found, kv=self._source.watched.kv_so_far(found))
        return WatchMoment(self._title(), found, self._source.verdict)

    def ask_stacks(self) -> None:
        """Have ranks that live write where they stand, for a later look."""
        found = self._source.evidence
        if found.problem is None:
            return
        self._source.watched.ask(
            process for rank, process in found.processes.items() if not found.signs[rank].ended
        )

    @abstractmethod
    def _title(self) -> str:
        """What is watched, in a line."""

    def debugger(self) -> Any:
        """A panel that follows the ranks, also while cells run: verdict, where each stands, layers and chunks where
        they are known, communication, stacks. Raises NotPossible where there are no views."""
        if self._show is None:
            raise NotPossible(NO_VIEWS.format(what="panels"))
        return self._show(self)

    def where(self) -> DisplayableText:
        """What each rank does, a line each."""
        return DisplayableText("\n".join(self._source.evidence.rank_lines))

    def verdict(self) -> Verdict:
        """Why the run does not move, or that it does. A hang that was found stays the verdict after the run."""
        found = self._source.evidence  # looking may end a verdict that stood
        return self._source.verdict or found.verdict

    @property
    def trace(self) -> Trace:
        """The ops that have been recorded so far, as events; those that have not ended have an `end` of 0."""
        return self._source.whole.trace

    @property
    def findings(self) -> list[OpFinding]:
        """What ended and is wrong all the same, also of KV."""
        return self._with_kv(self._source.whole).findings

    def kv(self) -> WatchedKv:
        """How many tokens of which layer each rank holds in its newest cache, and what was tapped beside it; `.diff()`
        says what is wrong."""
        return self._source.watched.kv(self._source.evidence)

    def compare(
        self,
        what: str = "reference",
        *,
        checkpoint: str | Path | None = None,
        ids: Sequence[int] | None = None,
        dtype: str | None = None,
    ) -> "WatchedComparison":
        """Run transformers beside a model that was watched with `compare=True`, or tapped, and say the first layer,
        chunk and token that differ, and by about how much.

        `checkpoint`: a folder or "demo"; `ids`: of the one sequence that was fed. If not given, they are what calls of
        a whole model of transformers were seen to use. `dtype`: if not given, that of what was taken. Raises
        NotPossible where one of them is not known, ModelError.
        """
        if what != "reference":
            raise NotPossible(
                f'{what!r} cannot be compared with; watch.compare("reference") is what there is.'
            )
        from dinfer.watching.reference import compare  # imports torch and transformers

        path = None if checkpoint is None else str(checkpoint)
        return compare(self._source.watched.rows(self._source.evidence), path, ids, dtype)

    def links(self) -> Table:
        """What went over each link and through each kind of collective: MB, seconds, MB/s, waiting."""
        return table_of(self._source.whole.trace)

    def stack(self, rank: int) -> DisplayableText:
        """Where the threads of a rank stood in Python when they were last asked."""
        found = self._source.evidence.stack(rank)
        return DisplayableText(found or f"rank {rank} has not been asked for its stack: it moves")

    def report(self, path: str | Path = "report.html") -> Path:
        """Write a report; raises NotPossible where there are no views, and for a name that ends otherwise than .html,
        OSError."""
        if self._write is None:
            raise NotPossible(NO_VIEWS.format(what="reports"))
        check_report(Path(path).expanduser())
        return self._write(self._kept(), free_path(Path(path)))

    def save(self, folder: str | Path) -> Path:
        """Write the trace, and what else is known, into a new folder, for `dinfer explain` and `dinfer report`. Raises
        OSError."""
        target = Path(folder)
        target.mkdir(parents=True)
        self._kept().export("jsonl", target / TRACE)
        return target

    def _kept(self) -> Trace:
        return self._with_kv(self._source.whole).kept(self._source.verdict)

    def _with_kv(self, found: Evidence) -> Evidence:
        return found if found.kv.layers else replace(found, kv=self._source.watched.kv(found))

    def _text(self) -> str:
        found = self._source.evidence  # looking may end a verdict that stood
        return WatchMoment(self._title(), found, self._source.verdict).text(self.findings)

    def __str__(self) -> str:
        return self._text()


class CommandWatch(Watch):
    """What `dinfer.watch("torchrun …")` returns: the command runs on. `folder` holds its output and its records;
    `status`: its exit status, None while it runs."""

    def __init__(
        self,
        command: str | Sequence[str],
        folder: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
        write: "WriteReport | None" = None,
        show: "ShowWatch | None" = None,
        compare: bool = False,
    ) -> None:
        words = shlex.split(command) if isinstance(command, str) else list(command)
        if not words:
            raise NotPossible('there is no command: dinfer.watch("torchrun --nproc-per-node 2 infer.py").')
        words = found(words)
        if not shutil.which(words[0]) and not Path(words[0]).exists():
            raise NotPossible(not_found(words[0]))
        self._temporary = None if folder else TemporaryFolder()
        self.folder = self._temporary.path if self._temporary else Path(folder or "")
        self.folder.mkdir(parents=True, exist_ok=True)
        records = self.folder / RECORDS
        if records.is_dir() and any(records.iterdir()):
            raise NotPossible(f"{self.folder} holds the records of another command: give another folder.")
        self._output = self.folder / "output.log"
        with self._output.open("wb") as file:
            self._command = WatchedCommand(
                words,
                records,
                tell=_tell,
                environment={**(environment or {}), **({COMPARE_VARIABLE: "1"} if compare else {})},
                output=file.fileno(),
            )
        self.status: int | None = None
        super().__init__(self._command, write, show)
        self._thread = threading.Thread(target=self._follow, name="dinfer watch", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            self.status = self._command.wait()
        finally:  # whatever telling of it runs into, the command has ended
            if self.status is None:
                self.status = exit_status(self._command.process.wait())

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the command has ended; its exit status. Raises WatchHung once it will not end by itself, and
        TimeoutError after so many seconds."""
        limit = None if timeout is None else time.monotonic() + timeout
        while self._thread.is_alive():
            left = LOOK_S if limit is None else min(LOOK_S, limit - time.monotonic())
            if left <= 0:
                raise TimeoutError(
                    f"the command has not ended within {timeout:g} s: .where() says what its ranks do."
                )
            self._thread.join(left)
            verdict = self._source.verdict
            if self.status is None and verdict and not is_end(verdict, self._source.evidence):
                raise WatchHung(verdict)
        assert self.status is not None
        return self.status

    def output(self) -> DisplayableText:
        """What the command has written so far."""
        return DisplayableText(self._output.read_text(encoding="utf-8", errors="replace"))

    def close(self) -> None:
        """End the command, if it still runs: by SIGTERM, and by SIGKILL if that does not help."""
        process = self._command.process
        if process.poll() is None:
            self._command.told_to_end()
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
        self._thread.join(STOP_S)

    @property
    def is_over(self) -> bool:
        return self.status is not None

    def _title(self) -> str:
        state = "runs" if self.status is None else f"ended with status {self.status}"
        return f"{shlex.join(self._command.command)} {state}"

    def __str__(self) -> str:
        return "\n".join(filter(None, [self._title(), self._text()]))


def _tell(verdict: Verdict) -> None:
    print_under_cell(f"dinfer: {verdict.severity.marked(verdict.sentence)}")


class EnginesSource:
    """Looks after the engines of a session until it is closed. `tell`: called with each new verdict."""

    def __init__(self, folder: Path | TemporaryFolder, tell: Callable[[Verdict], None] = _tell) -> None:
        self._folder = folder  # a temporary one stays for as long
        path = folder.path if isinstance(folder, TemporaryFolder) else folder
        self.watched, self._alarm, self._tell = Watched([path], one_job=True), HangAlarm(), tell
        self._evidence: Evidence | None = None
        self._is_recovering = False
        self._over_errors: frozenset[RaisedError] = frozenset()
        """that ended cells before the last recovery"""
        self._looking, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="dinfer watch", daemon=True)
        self._thread.start()

    @property
    def evidence(self) -> Evidence:
        self.look()
        assert self._evidence
        return self._evidence

    @property
    def whole(self) -> Evidence:
        with self._looking:
            return self._of_cells(self.watched.look()[0])

    @property
    def verdict(self) -> Verdict | None:
        return self._alarm.standing

    def look(self) -> None:
        if self._over.is_set() and self._evidence:  # the engines end, which is no news
            return
        with self._looking:
            self._evidence = self._of_cells(self.watched.look(recent=True)[0])
            new = None
            if not self._is_recovering:
                new = self._alarm.consider(self._evidence, time.monotonic())
            if self._alarm.is_suspicious:
                self.watched.ask(self._evidence.processes.values())
        if new:
            self._tell(new)

    def recovering(self, *, ended: bool) -> None:
        """The session ends engines, which is no news, or has done so: what cells ran into before is over then."""
        with self._looking:
            self._is_recovering = not ended
            if not ended:
                return
            self._alarm = HangAlarm()
            try:
                found = self.watched.look(recent=True)[0].processes.values()
            except Exception as error:  # the session has recovered all the same
                self.watched.trouble(error)
                return
            self._over_errors = frozenset(one.cell_raised for one in found if one.cell_raised)

    def _of_cells(self, evidence: Evidence) -> Evidence:
        return of_cells(evidence, self._over_errors)

    def waiting(self) -> list[int]:
        """The ranks that are in an op that does not end, by the verdict of now."""
        if self._evidence is None or not (self._alarm.standing or self._evidence.problem):
            return []
        events = self._evidence.trace.events
        return sorted(
            {event.rank for event in events if not event.end and (event.call is None or event.call.is_waited)}
        )

    @property
    def is_closed(self) -> bool:
        return self._over.is_set()

    def close(self) -> None:
        self._over.set()
        self._thread.join(STOP_S)

    def _follow(self) -> None:
        pace = Pace()
        while not self._over.wait(GLANCE_S):
            try:
                if pace.is_due(self._is_urgent):
                    with pace.looking():
                        self.look()
            except Exception as error:  # a later look may succeed
                self.watched.trouble(error)

    def _is_urgent(self) -> bool:
        return self._alarm.is_deciding or self.watched.has_news()


def of_cells(evidence: Evidence, over: Collection[RaisedError] = ()) -> Evidence:
    """What cells have done: in an engine's main thread. dinfer's own transfers are looked after by their run. `over`:
    what ended cells and counts no more. (Not by its time: a host's clock may be any.)"""
    events = tuple(
        event for event in evidence.trace.events if event.lane == MAIN and event.call and event.call.line
    )
    signs = dict(evidence.signs)
    for rank, process in evidence.processes.items():
        if process.cell_raised in over and signs[rank].between_cells:
            signs[rank] = replace(signs[rank], raised=None)
    return replace(evidence, trace=Trace(events, evidence.trace.about), signs=signs)


class EnginesWatch(Watch):
    """What `session.watch()` returns: every call of torch.distributed in `%%px` cells is seen."""

    INTERNAL = Watch.INTERNAL | {"recovering", "stuck_ranks"}

    def __init__(
        self, source: EnginesSource, write: "WriteReport | None" = None, show: "ShowWatch | None" = None
    ) -> None:
        super().__init__(source, write, show)
        self._engines = source

    @property
    def is_over(self) -> bool:
        return self._engines.is_closed

    def _title(self) -> str:
        return "no longer watched" if self.is_over else "%%px cells under watch"

    def stuck_ranks(self) -> list[int]:
        """The ranks that wait in an op that does not end."""
        return self._engines.waiting()

    def recovering(self, *, ended: bool) -> None:
        """The session recovers, or has recovered."""
        self._engines.recovering(ended=ended)

    def close(self) -> None:
        """Look no more; the engines go on recording."""
        self._engines.close()

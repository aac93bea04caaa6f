"""Runs a command under watch: every Python process that it starts, at any depth, records its torch.distributed ops."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from dinfer.verdict.verdict import Verdict
from dinfer.watch.zipped import watched_environment, write_zip
from dinfer.watching.alarm import HangAlarm, is_end
from dinfer.watching.evidence import Evidence
from dinfer.watching.folders import Watched
from dinfer.watching.listening import Listener
from dinfer.watching.pace import GLANCE_S, Pace

ENDS_S = 60.0
"""for so long a command may take to end once somebody has told it to; one that goes on does not mean to"""

LINGERS_S = 0.5
"""for so long ranks may take to end after their command has"""

ZIP = "probe.zip"
"""in the folder: the probe, which the command's Python processes have on their path"""

NOT_STARTED = 127
"""exit status of a command that is not found, as a shell's"""


def found(command: Sequence[str]) -> list[str]:
    """The command, with its program beside this Python where it is not on the path, as in kernels and shells whose
    environment is not activated."""
    program, *others = command
    beside = str(Path(sys.executable).parent / program)
    return [beside if not shutil.which(program) and shutil.which(beside) else program, *others]


def not_found(program: str) -> str:
    """What to say of a program that is not there."""
    return f"the command {program!r} was not found: it is not on the path, nor beside {sys.executable}."


def exit_status(status: int) -> int:
    """As a shell has it: 128 and more for a signal."""
    return status if status >= 0 else 128 - status


def start(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    output: int | None = None,
    starting: AbstractContextManager[object] | None = None,
) -> "subprocess.Popen[bytes]":
    """Start a command whose Python processes record into `folder`, which is made. `output`: a file descriptor for its
    standard output and error; `starting`: entered while it is started. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = write_zip(folder.absolute() / ZIP)
    errors = subprocess.STDOUT if output is not None else None
    with starting or nullcontext():
        return subprocess.Popen(
            command,
            env={**os.environ, **watched_environment(probe, folder), **(environment or {})},
            stdout=output,
            stderr=errors,
        )


def final_verdict(
    said: Evidence, told: Verdict | None, status: int, *, goes_on: bool, is_asked_to_end: bool
) -> Verdict | None:
    """The verdict on a job once its command has ended. `told`: that which stood before; `goes_on`: processes have
    outlived the command; `is_asked_to_end`: somebody has told it to end."""
    if goes_on:  # what was told of them still holds, and the command's end says nothing new of them
        return told if said.problem else None
    # A script may end well whatever its jobs do, and a program may kill its own helpers at its end.
    problem = said.problem if status != 0 or told else None
    if problem and is_asked_to_end and not told and is_end(problem, said):
        return None
    return problem


class JobFollowed:
    """One job of the command: its last look, and the verdict that was told of it."""

    def __init__(self) -> None:
        self.alarm = HangAlarm()
        self.evidence = Evidence.none()
        self._hung: Evidence | None = None

    def look(self, evidence: Evidence, now: float, *, is_ending: bool = False) -> Verdict | None:
        """Take the evidence of now; the verdict that is to be told, if one is. `is_ending`: somebody has told the
        command to end, so that the ends of ranks are no news."""
        self.evidence = evidence
        problem = evidence.problem
        if is_ending and problem and is_end(problem, evidence):
            return None
        new = self.alarm.consider(evidence, now)
        if problem is None or not is_end(problem, evidence):
            if not self._says_less(problem):
                self._hung = evidence if problem else None
        elif new:
            self._hung = evidence
        return new

    def _says_less(self, problem: Verdict | None) -> bool:
        """Whether it is what is known already, of fewer ranks: the others have lost their connections since."""
        known = self._hung.problem if self._hung else None
        return (
            problem is not None
            and known is not None
            and (problem.kind, problem.ranks) == (known.kind, known.ranks)
            and set(problem.blocked) < set(known.blocked)
        )

    def conclude(self, at_end: Evidence, status: int, before_end: Evidence | None = None) -> Evidence:
        """The evidence that tells most, once the command has ended: why it hung comes before how it was ended.
        `before_end`: of when somebody told the command to end, if somebody did."""
        told, hung = self.alarm.standing, self._hung
        if before_end is not None and not told:
            self.evidence = before_end if before_end.problem else at_end
            return self.evidence
        has_failed = status != 0 or (told is not None and at_end.problem is not None)
        self.evidence = hung if hung and has_failed else at_end
        # What has ended since says more of a rank that failed, unless it is the same.
        is_told_end = hung and told and is_end(told, hung)
        if (
            is_told_end
            and before_end is None
            and at_end.problem
            and told
            and at_end.problem.ranks != told.ranks
        ):
            self.evidence = at_end
        return self.evidence


class WatchedCommand:
    """A command under watch. `folder`: where its processes write; `tell`: called with each new verdict.

    `jobs` is the last look: a command may run several, one after the other or side by side. `evidence` is that of the
    job of which there is most to say, `verdict` what is wrong with it, if anything is.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        tell: Callable[[Verdict], None] | None = None,
        environment: Mapping[str, str] | None = None,
        output: int | None = None,
        starting: AbstractContextManager[object] | None = None,
        listener: Listener | None = None,
    ) -> None:
        """Starts it, see `start`. `listener`: by which other hosts join, which run parts of the same job. Raises
        OSError."""
        self.command, self.folder = list(command), folder
        folder.mkdir(parents=True, exist_ok=True)
        self._listener = listener
        self.watched = Watched([folder], self.command)
        self.jobs = self.watched.look()
        self.verdict: Verdict | None = None
        self.living: list[int] = []
        """numbers of the processes that still ran when the command had ended"""
        self._tell, self._followed = tell, dict[str, JobFollowed]()
        self._looking = threading.Lock()
        self._before_end: dict[str, Evidence] = {}
        self._ends_until = -1.0
        self.process = start(self.command, folder, environment, output=output, starting=starting)

    @property
    def evidence(self) -> Evidence:
        """Of the first job of which a verdict stands, else of the newest."""
        hung = (found for found in self.jobs if self.standing(found))
        return next(hung, self.jobs[-1])

    @property
    def whole(self) -> Evidence:
        """`evidence` with all ops, not the last ones only."""
        found = self.evidence
        if self.process.returncode is not None:
            return found
        with self._looking:
            now = (one for one in self.watched.look() if one.key == found.key)
            return found.with_older(next(now, found))

    def standing(self, found: Evidence) -> Verdict | None:
        """The verdict on that job that has been told and still holds."""
        followed = self._followed.get(found.key)
        return followed.alarm.standing if followed else None

    def told_to_end(self) -> None:
        """Somebody has sent the command a signal to end it: how its ranks stood before is what counts."""
        self._before_end = {found.key: found for found in self.jobs}
        self._ends_until = time.monotonic() + ENDS_S

    @property
    def _is_ending(self) -> bool:
        return time.monotonic() < self._ends_until

    def look(self) -> list[Evidence]:
        """Look once, and tell what is new."""
        news = []
        with self._looking:
            self._add_hosts()
            self.jobs = self.watched.look(recent=True)
            now = time.monotonic()
            for found in self.jobs:
                followed = self._followed.setdefault(found.key, JobFollowed())
                if new := followed.look(found, now, is_ending=self._is_ending):
                    news.append(new)
                if followed.alarm.is_suspicious or found.verdict.kind == "idle":
                    self.watched.ask(
                        process
                        for rank, process in found.processes.items()
                        if not (its := found.signs[rank]).ended and its.phase != "done" and not its.is_stopped
                    )
            self.verdict = self.standing(self.evidence)
        for new in news:
            self._say(new)
        return self.jobs

    def _add_hosts(self) -> None:
        for host in self._listener.hosts if self._listener else ():
            self.watched.add(host)

    def _say(self, verdict: Verdict) -> None:
        if self._tell:
            self._tell(verdict)
        if self._listener:
            self._listener.tell(str(verdict))

    def wait(self, each: Callable[[list[Evidence]], None] | None = None) -> int:
        """Look until the command ends; `each` is called after each look. Returns its exit status, as a shell has it."""
        pace = Pace()
        while True:
            try:
                status = self.process.wait(GLANCE_S)
                break
            except subprocess.TimeoutExpired:
                try:
                    if not pace.is_due(self._is_urgent):
                        continue
                    with pace.looking():
                        jobs = self.look()
                        if each:
                            each(jobs)
                except Exception as error:  # the command goes on, whatever a look at it runs into
                    self.watched.trouble(error)
        try:
            self.conclude(status)
        except Exception as error:  # its status is what counts
            self.watched.trouble(error)
        return exit_status(status)

    def _is_urgent(self) -> bool:
        deciding = any(followed.alarm.is_deciding for followed in self._followed.values())
        return deciding or self.watched.has_news()

    def conclude(self, status: int) -> None:
        """The last look, once the command has ended, and its parts on other hosts."""
        if self._listener:
            self._listener.wait_for_ends()
            status = status or max((host.status or 0 for host in self._listener.hosts), default=0)
        with self._looking:
            self._add_hosts()
            self.watched.look(recent=True)  # what has joined since the look before may go on
            self.living = self.watched.living(LINGERS_S)
            jobs = []
            for found in self.watched.look():
                followed = self._followed.setdefault(found.key, JobFollowed())
                told = followed.alarm.standing
                before_end = self._before_end.get(found.key) if self._is_ending else None
                said = followed.conclude(found, status, before_end)
                said = replace(said.with_older(found), kv=self.watched.kv(said))
                jobs.append(said)
                problem = final_verdict(
                    said, told, status, goes_on=bool(self.living), is_asked_to_end=before_end is not None
                )
                if problem and (not told or told.kind != problem.kind):
                    self._say(problem)
                followed.alarm.standing = problem
            self.jobs = jobs
            self.verdict = self.standing(self.evidence)

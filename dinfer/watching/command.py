"""Runs a command under watch: every Python process that it starts, at any depth, records its torch.distributed ops."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TextIO

from dinfer.display import takes_colour
from dinfer.severity import Severity
from dinfer.verdict.verdict import Verdict
from dinfer.watch.zipped import watched_environment, write_zip
from dinfer.watching.alarm import ENDS, HangAlarm
from dinfer.watching.evidence import Evidence
from dinfer.watching.figures import table_of
from dinfer.watching.folders import Watched

LOOK_S, SHARE = 0.25, 0.1
"""seconds between looks, and the part of the time that looking may take: a long record is looked at less often"""

LINES_S, TERMINAL_LINES_S = 5.0, 2.0
"""seconds between the lines about ranks, in a log and in a terminal"""

ZIP = "probe.zip"
"""in the folder: the probe, which the command's Python processes have on their path"""

_DURATION = re.compile(r", for [\d.]+ m?s")

NOT_STARTED = 127
"""exit status of a command that is not found, as a shell's"""


class WatchedCommand:
    """A command under watch. `folder`: where its processes write; `tell`: called with each new verdict.

    `evidence` is the last look, `verdict` what is wrong with the run, if anything is.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        tell: Callable[[Verdict], None] | None = None,
        environment: Mapping[str, str] | None = None,
        output: int | None = None,
    ) -> None:
        """Starts it. `output`: a file descriptor for its standard output and error. Raises OSError."""
        self.command, self.folder = list(command), folder
        folder.mkdir(parents=True, exist_ok=True)
        probe = write_zip(folder.absolute() / ZIP)
        self.watched = Watched([folder], self.command)
        self.alarm, self._tell = HangAlarm(), tell
        self.evidence = Evidence(self.watched.look().trace)
        self.verdict: Verdict | None = None
        self._hung: Evidence | None = None
        self._looking = threading.Lock()
        errors = subprocess.STDOUT if output is not None else None
        self.process = subprocess.Popen(
            self.command,
            env={**os.environ, **watched_environment(probe, folder), **(environment or {})},
            stdout=output,
            stderr=errors,
        )

    def look(self) -> Evidence:
        """Look once, and tell what is new."""
        with self._looking:
            self.evidence = self.watched.look()
            new = self.alarm.consider(self.evidence, time.monotonic())
            problem = self.evidence.problem
            if problem is None or problem.kind not in ENDS:
                self._hung = self.evidence if problem else None
            elif new:
                self._hung = self.evidence
            if self.alarm.is_suspicious or not self.evidence.processes:
                self.watched.ask(
                    rank
                    for rank, its in self.evidence.signs.items()
                    if not its.ended and its.phase != "done" and not its.is_stopped
                )
            self.verdict = self.alarm.standing
        if new and self._tell:
            self._tell(new)
        return self.evidence

    def wait(self, each: Callable[[Evidence], None] | None = None) -> int:
        """Look until the command ends; `each` is called after each look. Returns its exit status, as a shell has it."""
        pause = LOOK_S
        while True:
            try:
                status = self.process.wait(pause)
                break
            except subprocess.TimeoutExpired:
                began = time.monotonic()
                try:
                    evidence = self.look()
                except Exception as error:  # the command goes on, whatever a look at it runs into
                    text = f"looks fail: {type(error).__name__}: {error}"
                    if text not in self.watched.unreadable:
                        self.watched.unreadable.append(text)
                else:
                    if each:
                        each(evidence)
                pause = max(LOOK_S, (time.monotonic() - began) / SHARE)
        return self.conclude(status)

    def conclude(self, status: int) -> int:
        """The last look, once the command has ended. Why it hung comes before how it was ended."""
        told = self.alarm.standing
        with self._looking:
            at_end = self.watched.look()
            self.evidence = self._hung if self._hung and status != 0 else at_end
            # What has ended since says more of a rank that failed, unless it is the same.
            if told and told.kind in ENDS and at_end.problem and at_end.problem.ranks != told.ranks:
                self.evidence = at_end
        self.evidence = replace(self.evidence, rows=self.watched.rows())
        self.verdict = None if status == 0 else self.evidence.problem
        if self.verdict and self._tell and (not told or told.kind != self.verdict.kind):
            self._tell(self.verdict)
        return status if status >= 0 else 128 - status


class CommandLines:
    """What a command under watch is told about in the terminal, on standard error."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._shown, self._at = out, list[str](), time.monotonic()
        self._every = TERMINAL_LINES_S if out.isatty() else LINES_S

    def say(self, text: str) -> None:
        with suppress(OSError, ValueError):  # whoever reads it has gone; the command goes on
            print(text, file=self._out, flush=True)

    def ranks(self, evidence: Evidence) -> None:
        """A line for each rank, if something has changed for a while."""
        if time.monotonic() - self._at < self._every:
            return
        self._at = time.monotonic()
        lines = [f"dinfer: rank {rank} {evidence.where(rank)}" for rank in evidence.ranks]
        shown = [_DURATION.sub("", line) for line in lines]
        if shown != self._shown:
            self._shown = shown
            self.say("\n".join(lines))

    def verdict(self, verdict: Verdict) -> None:
        text = verdict.severity.marked(str(verdict), colour=takes_colour(self._out))
        self.say(f"dinfer: {text}")

    def conclusion(self, command: WatchedCommand) -> None:
        """Findings, links, and what the probe could not see."""
        for one in command.evidence.findings:
            self.say(f"dinfer: {Severity.WARNING.marked(one.text, colour=takes_colour(self._out))}")
        table = table_of(command.evidence.trace)
        if len(table):
            self.say(str(table))
        for rank, process in command.evidence.processes.items():
            for problem in process.problems:
                self.say(f"dinfer: rank {rank}: {problem}")
        for problem in command.watched.unreadable:
            self.say(f"dinfer: {problem}")
        if not command.evidence.trace.events:
            self.say(
                "dinfer: no torch.distributed ops were seen: did the command start Python processes with torch?"
            )


_PASSED_ON = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT,
)  # fmt: skip
"""schedulers send some of them before a time limit"""


class PassedOn:
    """While it is entered, signals that would end this process are passed on to the command instead.

    Ctrl-C in a terminal reaches the command by itself, which is in the same process group. `on_interrupt` is called
    first, with what was known then.
    """

    def __init__(self, command: WatchedCommand, on_interrupt: Callable[[], None]) -> None:
        self._command, self._on_interrupt = command, on_interrupt
        self._before: dict[int, object] = {}
        self._told = False

    def __enter__(self) -> "PassedOn":
        for number in _PASSED_ON:
            self._before[number] = signal.signal(number, self._pass_on)
        return self

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and not self._told:
            self._told = True
            self._on_interrupt()
        if number != signal.SIGINT or not _is_from_terminal():
            with suppress(ProcessLookupError):
                self._command.process.send_signal(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _is_from_terminal() -> bool:
    """Whether this process is in the foreground of a terminal, whose Ctrl-C all of the foreground gets."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False

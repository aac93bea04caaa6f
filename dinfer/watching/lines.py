"""What the terminal is told of a command under watch, on standard error."""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from dinfer.display import takes_colour
from dinfer.errors import DinferError
from dinfer.severity import Severity
from dinfer.verdict.op_text import merged_lines, without_durations
from dinfer.verdict.verdict import Verdict
from dinfer.watching.command import WatchedCommand
from dinfer.watching.evidence import Evidence
from dinfer.watching.figures import table_of

LINES_S, TERMINAL_LINES_S = 5.0, 2.0
"""seconds between the lines about ranks, in a log and in a terminal"""


class CommandLines:
    """`out`: None where standard error is closed: then nothing is said."""

    def __init__(self, out: TextIO | None) -> None:
        self._out, self._shown, self._at = out, list[str](), time.monotonic()
        self._every = TERMINAL_LINES_S if out is not None and out.isatty() else LINES_S
        self._notes = set[str]()

    def say(self, text: str) -> None:
        if self._out is not None:
            with suppress(OSError, ValueError):  # whoever reads it has gone; the command goes on
                print(text, file=self._out, flush=True)

    def marked(self, severity: Severity, text: str) -> None:
        colour = self._out is not None and takes_colour(self._out)
        self.say(f"dinfer: {severity.marked(text, colour=colour)}")

    def ranks(self, jobs: Sequence[Evidence]) -> None:
        """A line for each rank, ranks that do the same on one, if something has changed for a while."""
        self.notes(jobs)
        if time.monotonic() - self._at < self._every:
            return
        self._at = time.monotonic()
        lines = [line for found in jobs for line in rank_lines(found)]
        shown = [without_durations(line) for line in lines]
        if shown != self._shown:
            self._shown = shown
            self.say("\n".join(f"dinfer: {line}" for line in lines))

    def interrupted(self, command: WatchedCommand) -> None:
        """Where the ranks stood when somebody lost patience, unless a verdict has said it."""
        for found in command.jobs:
            if command.standing(found) is None:
                for line in rank_lines(found):
                    self.say(f"dinfer: interrupted; {line}")
                if found.problem or found.verdict.kind == "idle":
                    self.marked(found.verdict.severity, found.verdict.sentence)

    def verdict(self, verdict: Verdict) -> None:
        self.marked(verdict.severity, str(verdict))

    def joined(self, host: str) -> None:
        self.say(f"dinfer: host {host} has joined")

    def told_elsewhere(self, text: str) -> None:
        """A verdict that was told where this host has joined."""
        self.marked(Severity.ERROR, text)

    def notes(self, jobs: Sequence[Evidence]) -> None:
        """What cannot be read, once."""
        for note in dict.fromkeys(note for found in jobs for note in found.notes):
            if note not in self._notes:
                self._notes.add(note)
                self.say(f"dinfer: {note}")

    def conclusion(self, command: WatchedCommand, status: int) -> None:
        """Findings, links, and what the probe could not see."""
        self.notes(command.jobs)
        for found in command.jobs:
            head = f"{found.job}: " if found.job else ""
            for one in found.findings:
                self.marked(Severity.WARNING, f"{head}{one.text}")
            table = table_of(found.trace)
            if len(table):
                self.say(f"{found.job}\n{table}" if found.job else str(table))
            for rank, process in found.processes.items():
                for problem in process.problems:
                    self.say(f"dinfer: {head}rank {rank}: {problem}")
        for problem in command.watched.unreadable:
            if problem not in self._notes:
                self.say(f"dinfer: {problem}")
        if command.living:
            self.say(
                f"dinfer: the command has ended, and {len(command.living)} of its processes go on and record: "
                f"`dinfer explain {command.folder}` says what they do."
            )
        if not any(found.trace.events for found in command.jobs):
            why = (
                "did the command start Python processes with torch?"
                if status == 0
                else f"the command ended before, with status {status}; what it wrote itself says why."
            )
            self.say(f"dinfer: no torch.distributed ops were seen: {why}")

    def compared(self, command: WatchedCommand, checkpoint: str | None) -> None:
        """The model beside transformers' own, or why that is not possible."""
        from dinfer.watching.reference import compare  # imports torch and transformers

        try:
            found = compare(command.watched.rows(command.evidence), checkpoint)
        except DinferError as error:
            self.marked(Severity.WARNING, f"not compared: {error}")
        else:
            self.marked(found.severity, str(found))


def rank_lines(found: Evidence) -> list[str]:
    """What each rank does; ranks that do the same on one line."""
    head = f"{found.job}: " if found.job else ""
    lines = merged_lines(f"rank {rank}: {found.where(rank)}" for rank in found.ranks)
    return [f"{head}{line}" for line in lines]

"""The lab's results, cell by cell and as a scoreboard. Pure."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from dinfer.display import Table
from dinfer.lab.faults import RULES, Cell, Expected


@dataclass(frozen=True)
class Result:
    """The result of one cell. `kind`, `rank`, `sentence`: the verdict, `kind` "" for none; `seconds`: from the last
    progress of any rank (for a death and a verdict on request: from the fault) to the verdict."""

    cell: Cell
    expected: Expected
    kind: str
    rank: int | None
    sentence: str
    seconds: float | None
    recovered_s: float = 0.0

    @property
    def correct(self) -> bool:
        return self.expected.is_met_by(self.kind, self.rank, self.sentence)

    @property
    def in_time(self) -> bool:
        """Whether the verdict came within a second after a death, and within five after anything else that hangs."""
        limit_s = 1.0 if self.expected.kind == "dead" else 5.0
        return self.seconds is not None and (RULES[self.cell.fault].is_slow or self.seconds <= limit_s)

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.cell._asdict(),
            "expected": {"kind": self.expected.kind, "rank": self.expected.rank, "op": self.expected.op},
            "named": {"kind": self.kind, "rank": self.rank, "sentence": self.sentence},
            "correct": self.correct,
            "seconds": self.seconds,
            "in_time": self.in_time,
            "recovered_s": self.recovered_s,
        }


@dataclass
class Score:
    """All results so far. `planned`: the number of cells to run; `alarms`: the verdicts on clean runs; `links`: where
    links were broken, "" before that is decided."""

    seed: int
    planned: int
    results: list[Result] = field(default_factory=list)
    clean_runs: int = 0
    alarms: list[str] = field(default_factory=list)
    links: str = ""

    @property
    def all_right(self) -> bool:
        """Whether every verdict was right, no clean run got one, and no cell was left out."""
        return not self.alarms and len(self.results) == self.planned and all(r.correct for r in self.results)

    def as_dict(self) -> dict[str, Any]:
        return {
            "cells": [result.as_dict() for result in self.results],
            "planned": self.planned,
            "clean_runs": self.clean_runs,
            "false_alarms": len(self.alarms),
            "alarms": self.alarms,
            "links": self.links,
            "seed": self.seed,
        }

    def table(self) -> str:
        """A row for each fault and one for all; then clean runs, and a line for each wrong verdict."""
        rows = list[tuple[object, ...]]()
        for name in (*RULES, "all"):
            some = [result for result in self.results if name in (result.cell.fault, "all")]
            if some or name == "all":
                times = [result.seconds for result in some if result.seconds is not None]
                shown = (f"{median(times):.2f}", f"{max(times):.2f}") if times else ("-", "-")
                correct, in_time = sum(one.correct for one in some), sum(one.in_time for one in some)
                rows.append((name, len(some), correct, in_time, *shown))
        lines = [str(Table(("fault", "cells", "correct", "in time", "median s", "max s"), rows))]
        lines.append(f"clean runs: {self.clean_runs}, false alarms: {len(self.alarms)}")
        if left := self.planned - len(self.results):
            lines.append(f"not done: {left} of {self.planned} cells")
        lines += [f"false alarm: {alarm}" for alarm in self.alarms]
        lines += [f"wrong: {result_line(result)}" for result in self.results if not result.correct]
        return "\n".join(lines)


def result_line(result: Result) -> str:
    """A line with the cell, the expected verdict and, if it differs, the verdict."""
    wanted = f"{result.expected.kind}, rank {result.expected.rank}"
    seconds = "" if result.seconds is None else f" after {result.seconds:.2f} s"
    if result.correct:
        return f"{result.cell}: {wanted}{seconds}"
    named = f"{result.kind}, rank {result.rank}: {result.sentence}" if result.kind else "nothing"
    at = f" at `{result.expected.op}`" if result.expected.op else ""
    return f"{result.cell}: not {wanted}{at}, but {named}{seconds}"

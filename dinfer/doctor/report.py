"""What the doctor found, as text for people and as JSON. Pure."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dinfer.doctor.check import Check, CheckState, significant

if TYPE_CHECKING:
    from dinfer.doctor.pair_rank import PairSpeed

WIDTH = 110

COLOURS: dict[CheckState, str] = {"ok": "32", "warn": "33", "fail": "1;31", "unchecked": "36"}


@dataclass(frozen=True)
class Report:
    """One examination of one host; `host` in words, `seconds` that it took."""

    host: str
    checks: Sequence[Check]
    pairs: "Sequence[PairSpeed]"
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.having("fail")

    def having(self, state: CheckState) -> list[Check]:
        return [check for check in self.checks if check.state == state]


def to_json(report: Report) -> dict[str, Any]:
    return {
        "host": report.host,
        "checks": [asdict(check) for check in report.checks],
        "pairs": [pair._asdict() for pair in report.pairs],
        "seconds": round(report.seconds, 1),
        "ok": report.ok,
    }


def as_text(report: Report, colour: bool = False) -> str:
    """A line or more for each check, the pairs as tables, and a sentence."""
    name_width = max(len(check.name) for check in report.checks)
    lines = [report.host, ""]
    for check in report.checks:
        lines += _check_lines(check, name_width, colour)
    if report.pairs:
        lines += ["", *_pair_tables(report.pairs)]
    return "\n".join([*lines, "", *textwrap.wrap(sentence(report), WIDTH)])


def sentence(report: Report) -> str:
    """How things stand, and what to do first."""
    failed, warned, unchecked = (report.having(state) for state in ("fail", "warn", "unchecked"))
    made = len(report.checks) - len(unchecked)
    done = f"{made} check{'' if made == 1 else 's'} in {report.seconds:.0f} s"
    verdict = "dinfer can run here"
    if failed:
        it = "it" if len(failed) == 1 else "these"
        verdict = f"{_names(failed)} failed: fix {it} and run dinfer doctor again"
    also = f"; worth a look: {_names(warned)}" if warned else ""
    left_out = f"; not checked: {_names(unchecked)}" if unchecked else ""
    return f"{done}: {verdict}{also}{left_out}."


def _names(checks: Sequence[Check]) -> str:
    *some, last = [check.name for check in checks]
    return f"{', '.join(some)} and {last}" if some else last


def _check_lines(check: Check, name_width: int, colour: bool) -> list[str]:
    state = f"{check.state:<9}"
    shown = f"\x1b[{COLOURS[check.state]}m{state}\x1b[0m" if colour else state
    indent = " " * (len(state) + name_width + 4)
    first, *more = textwrap.wrap(check.found, WIDTH - len(indent), break_on_hyphens=False) or [""]
    lines = [f"{shown}  {check.name:<{name_width}}  {first}", *(indent + line for line in more)]
    # A fix is there to be copied: it stays on its line.
    return [*lines, f"{indent}→ {check.fix}"] if check.fix else lines


def _pair_tables(pairs: "Sequence[PairSpeed]") -> list[str]:
    """Rank × rank: latency and bandwidth, side by side where there is room."""
    latency = {(p.source, p.target): significant(1e3 * p.latency_s) for p in pairs}
    speed = {(p.source, p.target): significant(p.bytes_per_s / 1e6, 3) for p in pairs}
    left, right = _table("latency, ms", latency), _table("bandwidth, MB/s", speed)
    width = max(map(len, left))
    if width + 6 + max(map(len, right)) > WIDTH:
        return [*left, "", *right]
    return [f"{a:<{width}}      {b}".rstrip() for a, b in zip(left, right, strict=True)]


def _table(title: str, cells: dict[tuple[int, int], str]) -> list[str]:
    ranks = sorted({rank for pair in cells for rank in pair})
    rows = [["from \\ to", *(f"rank {rank}" for rank in ranks)]]
    rows += [[f"rank {a}", *(cells.get((a, b), "–" if a == b else "?") for b in ranks)] for a in ranks]
    width = max(len(cell) for row in rows for cell in row[1:]) + 2
    return [title, *(f"{row[0]:<9}" + "".join(f"{cell:>{width}}" for cell in row[1:]) for row in rows)]

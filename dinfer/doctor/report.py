"""The result of each check, and the doctor's report as text for people and as JSON. Pure."""

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dinfer.display import Table
from dinfer.severity import Severity

CheckState = Literal["ok", "warn", "fail", "unchecked"]

LET_LOOPBACK_PASS = "let the firewall pass the loopback: sudo iptables -I INPUT -i lo -j ACCEPT"
"""a fix"""


@dataclass(frozen=True)
class Check:
    """`found`: what the check found, or why it could not run; `fix`: what to do about it, "" for nothing."""

    name: str
    state: CheckState
    found: str
    fix: str = ""


@dataclass(frozen=True, order=True)
class PairSpeed:
    """The link from one rank to another: latency of a small message, and bandwidth for large ones."""

    source: int
    target: int
    latency_s: float
    bytes_per_s: float


WIDTH = 110

SEVERITIES: dict[CheckState, Severity] = {
    "ok": Severity.OK,
    "warn": Severity.WARNING,
    "fail": Severity.ERROR,
    "unchecked": Severity.NOTE,
}

STATE_WIDTH = 9
"""columns of the longest mark"""


@dataclass(frozen=True)
class Report:
    """All checks of one host. `host` describes it; `seconds`: how long the checks took."""

    host: str
    checks: Sequence[Check]
    pairs: Sequence[PairSpeed]
    seconds: float

    @property
    def ok(self) -> bool:
        return all(check.state != "fail" for check in self.checks)


def to_json(report: Report) -> dict[str, Any]:
    return {**asdict(report), "seconds": round(report.seconds, 1), "ok": report.ok}


def as_text(report: Report, colour: bool = False) -> str:
    """The checks, the links between ranks as tables, and a sentence. `colour`: marks in ANSI colours."""
    width = WIDTH - STATE_WIDTH - 4 - max(len(check.name) for check in report.checks)
    rows = []
    for check in report.checks:
        found = textwrap.fill(check.found, width, break_on_hyphens=False)
        fix = f"\n→ {check.fix}" if check.fix else ""  # on one line, so that it can be copied
        rows.append((SEVERITIES[check.state].mark.ljust(STATE_WIDTH), check.name, found + fix))
    checks = str(Table(("", "", ""), rows))
    if colour:
        for severity in Severity:
            mark = re.compile(f"^{severity.mark}", re.MULTILINE)
            checks = mark.sub(severity.painted(severity.mark), checks)
    tables = []
    if report.pairs:
        latency = {(p.source, p.target): significant(1e3 * p.latency_s) for p in report.pairs}
        speed = {(p.source, p.target): significant(p.bytes_per_s / 1e6, 3) for p in report.pairs}
        tables = [_pair_table("latency, ms", latency), _pair_table("bandwidth, MB/s", speed)]
    return "\n\n".join([report.host, checks, *tables, textwrap.fill(sentence(report), WIDTH)])


def _pair_table(title: str, cells: dict[tuple[int, int], str]) -> str:
    """Rank × rank."""
    ranks = sorted({rank for pair in cells for rank in pair})
    columns = ["from \\ to", *(f"rank {rank}" for rank in ranks)]
    rows = [[f"rank {a}", *(cells.get((a, b), "–" if a == b else "?") for b in ranks)] for a in ranks]
    return f"{title}\n{Table(columns, rows)}"


def sentence(report: Report) -> str:
    """Whether dinfer can run here, and what to do first."""
    failed, warned, unchecked = (
        [check.name for check in report.checks if check.state == state]
        for state in ("fail", "warn", "unchecked")
    )
    made = len(report.checks) - len(unchecked)
    done = f"{made} check{'' if made == 1 else 's'} in {report.seconds:.0f} s"
    verdict = "dinfer can run here"
    if failed:
        it = "it" if len(failed) == 1 else "these"
        verdict = f"{_listed(failed)} failed: fix {it} and run dinfer doctor again"
    also = f"; worth a look: {_listed(warned)}" if warned else ""
    left_out = f"; not checked: {_listed(unchecked)}" if unchecked else ""
    return f"{done}: {verdict}{also}{left_out}."


def _listed(names: Sequence[str]) -> str:
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last


# -- numbers as text


def gib(size: float) -> str:
    """Bytes as text, such as 1.5 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def significant(value: float, digits: int = 2) -> str:
    """A positive number for reading: 0.0123 → 0.012, 1234.5 → 1,234."""
    decimals = max(0, digits - 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{decimals}f}"


def rate(bytes_per_s: float) -> str:
    """Bytes a second as text, such as 1.4 GB/s."""
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_s >= size:
            return f"{significant(bytes_per_s / size)} {unit}"
    return f"{significant(bytes_per_s / 1e3)} kB/s"

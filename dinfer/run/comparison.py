"""Two runs side by side, live, over or saved: their KV by digests, new tokens, times, plan, parameters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dinfer.cluster.ranks import RankRefused
from dinfer.config import Config
from dinfer.display import Composed, Displayable, Table, Tidy, numbers_text
from dinfer.errors import DinferError
from dinfer.kv.difference import Diff
from dinfer.kv.ledger import BlockKey
from dinfer.kv.source import ViewableSource
from dinfer.kv.view import KV
from dinfer.plan.ops import PlanError
from dinfer.plan.plan import Plan
from dinfer.run.failure import RankFailed
from dinfer.run.report import parameters
from dinfer.run.state import Standing, State
from dinfer.saved.saved import Saved
from dinfer.severity import Severity
from dinfer.tabular import TableRow, Tabular
from dinfer.trace.findings import Findings, findings_of, with_findings
from dinfer.trace.summary import summary, verdict
from dinfer.trace.trace import Trace

MARK = "≠"
"""in the last column of rows in which the runs differ"""

LESS = 1.05
"""times that differ by a smaller factor are not marked: one run of each cannot show so small a difference"""


class HeldRun(Protocol):
    """A run of a session, as it is compared."""

    @property
    def name(self) -> str: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def config(self) -> Config: ...
    @property
    def trace(self) -> Trace: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def text(self) -> str: ...
    def last_standing(self) -> Standing: ...
    def source(self) -> ViewableSource: ...
    def kv(self) -> KV: ...


@dataclass(frozen=True)
class ComparedSide:
    """One of the two runs. `trace`: with findings in it, at least the run's state; `tokens`: the new ones."""

    name: str
    state: str
    plan: Plan
    trace: Trace
    parameters: Mapping[str, Any]
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, repr=False)
class RunComparison(Tidy, Tabular, Composed):
    """What `run.compare(other)` returns. `kv`: where the KV of this run differs from the other's, None where it cannot
    be compared, and `why` then says why; `first_block`: the (chunk, layer) of the first block that differs, None if
    none does, or of new tokens; `first_token`: the index of the first new token that differs, None if none does;
    `time`: which was faster, in a sentence; `rows`: (what, of this run, of the other, mark)."""

    INTERNAL = frozenset({"sides"})

    sides: tuple[ComparedSide, ComparedSide]
    kv: Diff | None
    why: str
    first_block: BlockKey | None
    first_token: int | None
    time: str
    rows: tuple[tuple[str, str, str, str], ...]

    @property
    def equal(self) -> bool:
        """Whether both hold the same KV and have made the same new tokens, as far as both have come."""
        return self.kv is not None and self.kv.equal and self.first_token is None

    @property
    def severity(self) -> Severity:
        # A loss of KV that was chosen is no fault, unless it has changed the answer.
        return max(severity for severity, _ in self._found())

    def said(self) -> list[tuple[Severity, str]]:
        """What is to be said of KV, then of new tokens, each with how grave it is; nothing of tokens where one of the
        runs has none."""
        return [(severity, text) for severity, text in self._found() if text]

    def table(self) -> Table:
        """What the runs are, made and took; `≠` marks what differs."""
        return Table(("", *(side.name for side in self.sides), "differs"), self.rows)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        return self.table().columns, self.rows

    def _parts(self) -> Iterable[str | Displayable]:
        yield "\n".join(filter(None, [self.kv_text(), self.token_text(), self.time]))
        yield self.table()

    def kv_text(self) -> str:
        """How the KV differs, or why it was not compared, in a sentence."""
        if self.kv is None:
            return f"KV was not compared: {self.why}"
        if self.kv.equal:
            return self.kv.verdict
        if self.first_block is None:
            return self.kv.verdict
        chunk, layer = self.first_block
        first = next(one for one in self.kv.differences if (one.chunk, one.layer) == self.first_block)
        return f"KV differs, first at block c{chunk} l{layer}; {first}"

    def token_text(self) -> str:
        """Whether the new tokens agree; "" where one of the runs has none."""
        one, other = self.sides
        if not one.tokens or not other.tokens:
            return ""
        if self.first_token is None:
            common = min(len(one.tokens), len(other.tokens))
            return f"the same new tokens, the first {common}" if common else ""
        at = self.first_token
        return f"new token {at + 1} is the first that differs: {one.tokens[at]} and {other.tokens[at]}"

    def _found(self) -> tuple[tuple[Severity, str], tuple[Severity, str]]:
        kv = Severity.NOTE if self.kv is None else self.kv.severity
        tokens = Severity.OK if self.first_token is None else Severity.ERROR
        return (kv, self.kv_text()), (tokens, self.token_text())


def compare_runs(one: "HeldRun | Saved", other: "HeldRun | Saved") -> RunComparison:
    """Compare two runs as far as both have come. Raises as `trace` and `kv` of a run that moves and cannot go on do."""
    sides = side_of(one), side_of(other)
    kv, why = None, ""
    try:
        kv = one.kv().diff(other)
    except (PlanError, RankRefused, RankFailed, DinferError) as error:
        why = str(error)
    at = {(one.chunk, one.layer) for one in kv.differences if one.chunk is not None} if kv else set()
    pairs = enumerate(zip(sides[0].tokens, sides[1].tokens, strict=False))
    figures = [summary(side.trace) for side in sides]
    names = sides[0].name, sides[1].name
    return RunComparison(
        sides,
        kv,
        why,
        min(at, default=None),
        next((n for n, (a, b) in pairs if a != b), None),
        verdict(figures[0], figures[1], names),
        tuple(_rows(sides, figures)),
    )


def side_of(run: "HeldRun | Saved") -> ComparedSide:
    """What is compared of a run, besides its KV."""
    if isinstance(run, Saved):
        source, findings = run.source(), run.findings
        return ComparedSide(
            name=source.subject.name,
            state=findings.state,
            plan=run.plan,
            trace=run.trace,
            parameters=findings.parameters,
            tokens=source.subject.ids[len(source.subject.prompt) :],
            text=findings.text or "",
        )
    last = run.last_standing()
    failure = last.message if last.state.severity > Severity.NOTE else ""
    known = Findings(state=str(last.state), failure=failure)
    return ComparedSide(
        name=run.name,
        state=str(last.state),
        plan=run.plan,
        trace=with_findings(run.trace, known),
        parameters=parameters(run.config),
        tokens=tuple(run.tokens),
        text=run.text,
    )


def figures_of(side: ComparedSide) -> dict[str, Any]:
    """See `summary`; `prefill_s` is None where prefill has not ended."""
    found = summary(side.trace)
    ended = found["ended"] and side.state in ("", State.DONE, State.DECODING)
    return {**found, "prefill_s": found["prefill_s"] if ended else None}


def _rows(
    sides: Sequence[ComparedSide], figures: Sequence[Mapping[str, Any]]
) -> Iterable[tuple[str, str, str, str]]:
    """Results, times, the plan, then the parameters that differ."""
    texts: dict[str, Callable[[ComparedSide], str]] = {
        "state": lambda side: side.state,
        "new tokens": lambda side: str(len(side.tokens)),
        "new text": lambda side: _shortened(side.text),
        "failure": lambda side: findings_of(side.trace).failure.partition("\n")[0],
    }
    for name, text in texts.items():
        yield from _row(name, [text(side) for side in sides])
    numbers = {"prefill, s": ("prefill_s", 1.0), "MB sent": ("bytes", 1e-6)}
    for name, (key, factor) in numbers.items():
        values = [one[key] * factor if one["ended"] else None for one in figures]
        cells = ["not ended" if value is None else f"{value:,.3f}" for value in values]
        known = [value for value in values if value is not None]
        differs = len(known) == 2 and max(known) > LESS * min(known)
        yield name, cells[0], cells[1], MARK * differs
    for name, key in (("exposed communication", "exposed"), ("bubble", "bubble")):
        shares = [f"{100 * one[key]:.1f} %" if one["ended"] else "not ended" for one in figures]
        differs = abs(figures[0][key] - figures[1][key]) >= 0.05
        yield name, shares[0], shares[1], MARK * differs
    plans: dict[str, Callable[[Plan], str]] = {
        "schedule": lambda plan: plan.schedule,
        "sync strategy": lambda plan: plan.sync_strategy,
        "chunks, tokens": lambda plan: numbers_text([len(chunk) for chunk in plan.shape.chunks]),
        "first layer of each rank": lambda plan: ", ".join(map(str, plan.shape.starts)),
        "ops": lambda plan: f"{sum(len(lane.ops) for lanes in plan.lanes for lane in lanes):,}",
        "plan": lambda plan: f"{plan.id:016x}",
    }
    for name, of in plans.items():
        yield from _row(name, [of(side.plan) for side in sides])
    shown = {"schedule", "sync_strategy", "chunk_size"}
    for name in dict.fromkeys(name for side in sides for name in side.parameters):
        cells = [str(side.parameters.get(name, "–")) for side in sides]
        if name not in shown and cells[0] != cells[1]:
            yield from _row(name, cells)


def _row(name: str, cells: Sequence[str]) -> Iterable[tuple[str, str, str, str]]:
    if any(cells):
        yield name, cells[0], cells[1], MARK * (cells[0] != cells[1])


def _shortened(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= 60 else f"{plain[:59]}…"

"""ReadOnlyRun: a saved run, or a trace, as views hold a run: it answers what is known, and refuses to move."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NoReturn

from dinfer.errors import NotPossible
from dinfer.kv.difference import Diff
from dinfer.kv.source import Selection
from dinfer.kv.view import KV
from dinfer.messages import Stand
from dinfer.plan.cut import Unit
from dinfer.plan.plan import Plan
from dinfer.results import Breakpoints
from dinfer.run.state import MOVING, Mark, Marks, Standing, State
from dinfer.saved.saved import Saved
from dinfer.severity import Severity
from dinfer.trace.events import Event
from dinfer.trace.trace import Trace
from dinfer.verdict.verdict import Verdict
from dinfer.views.report.facts import marks_of, plan_of, stands_in

DIFFERED = "differed when this was written: `compare ranks` says where"


class NoFaults:
    """The armed faults of a run that is over: none can be disarmed. `refuse` says why."""

    def __init__(self, refuse: Callable[[], NoReturn]) -> None:
        self._refuse = refuse

    def clear(self) -> None:
        self._refuse()


class ReadOnlyRun:
    """See `views.protocol.InspectableRun`. `read_only` says what it is, for the panel. Raises NotPossible for a trace
    that no plan of dinfer can be found for."""

    def __init__(self, saved: Saved) -> None:
        self._saved, self.last_call = saved, ""
        self.plan = _plan_of(saved)
        self.world_size = self.plan.world_size
        self.breakpoints, self.faults = Breakpoints({}, lambda *_: None), NoFaults(self._refuse)
        self._listeners: list[Callable[[], None]] = []
        shape = self.plan.shape
        marks = marks_of(saved.findings, (shape.layers, len(shape.chunks), self.world_size))
        self._found = [mark if mark.text else mark._replace(text=DIFFERED) for mark in marks]
        self._compared = Marks()

    @property
    def read_only(self) -> str:
        """What this is, and how to make the calls that the panel shows."""
        kind = "a trace, without KV" if self._saved.about is None else "a saved run"
        return f"{kind}: read-only. In a notebook: run = dinfer.open({str(self._saved.path)!r})"

    # -- what is known

    def standing(self) -> Standing:
        findings, about, ranks = self._saved.findings, self._saved.about, range(self.world_size)
        devices = {one.rank: one.device for one in findings.ranks}
        new = {one.rank: len(one.tokens or ()) for one in findings.ranks}
        decoded = len(about.tokens) if about else max(new.values(), default=0)
        answered = {one.rank for one in about.ranks} if about else set(ranks)
        state = self._state
        failure = findings.failure.partition("\n")[0]
        return Standing(
            self._stands,
            state,
            failure or findings.message,
            decoded,
            _new_text(self._saved),
            tuple(devices.get(rank, "") for rank in ranks),
            tuple(state != State.LOST or rank in answered for rank in ranks),
            self.last_call,
            faults=findings.faults,
            marks=(*self._found, *self._compared),
            tokens=tuple(new.get(rank, 0) for rank in ranks),
            verdict=findings.failure,
            nonfinite=findings.nonfinite,
            severity=state.severity if failure else Severity.NOTE,
            begun=1,
        )

    @property
    def _state(self) -> State:
        about = self._saved.about
        word = (about.state if about else "") or self._saved.findings.state
        if word in MOVING:  # earlier versions said so of a run that hung
            return State.HUNG
        if word in tuple(State):
            return State(word)
        ops = [tuple(len(lane.ops) for lane in lanes) for lanes in self.plan.lanes]
        return State.DONE if [stand.positions for stand in self._stands] == ops else State.PAUSED

    @cached_property
    def _stands(self) -> tuple[Stand, ...]:
        positions: Sequence[Sequence[int]] = self._saved.findings.positions
        if self._saved.about and self._saved.about.positions:
            positions = self._saved.about.positions
        if not stands_in(self.plan, positions):  # not known
            positions = _ended_ops(self.plan, self._saved.trace)
        return tuple(Stand(tuple(at), (False,) * len(at), tuple(at)) for at in positions)

    @property
    def predicted(self) -> Mapping[str, float]:
        """What the planner had predicted, seconds by name; empty where it had not."""
        return self._saved.findings.predicted

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    def chunk_labels(self) -> list[str]:
        about, chunks = self._saved.about, self.plan.shape.chunks
        if about and about.texts:
            return ["".join(about.texts[chunk.start : chunk.stop]) for chunk in chunks]
        given = self._saved.findings.chunk_texts
        return list(given) if len(given) == len(chunks) else [""] * len(chunks)

    def events_since(self, read: Sequence[int]) -> tuple[list[Event], list[int]]:
        events = self._saved.trace.events
        return list(events[read[1] if read else 0 :]), [1, len(events)]

    def verdict(self) -> Verdict | str:
        """Judged again from where a saved run stood; of a trace, what was found then."""
        if self._saved.about is not None:
            return self._saved.verdict()
        return self._saved.findings.failure or f"the trace says of the run: {self._state}"

    def kv(self, *, layer: int | None = None) -> KV:
        return self._saved.noted_kv(layer, self._note)

    def compare(self, what: object, /) -> object:
        if not self._saved.about:
            raise NotPossible(f"a trace has no KV to compare with {what!r}.")
        raise NotPossible(
            f"a saved run cannot be compared with {what!r} here, which takes its checkpoint and a session: begin a run "
            "of the same prompt. In a notebook, run.diff(another run) compares it with that, and run.bisect() with the "
            "reference."
        )

    def _note(self, found: Diff, chosen: Selection) -> None:
        self._found = [mark for mark in self._found if not _is_compared(mark, chosen)]
        self._compared.note_diff(found, chosen)
        for callback in list(self._listeners):
            callback()

    # -- what would move or change it

    def _refuse(self) -> NoReturn:
        raise NotPossible(
            f"this is {'a trace' if self._saved.about is None else 'a saved run'}: read-only. Begin a run of the same "
            "prompt to step it, or replay a rank of a saved one: run.replay(rank=0)."
        )

    def step(self, unit: Unit, n: int = 1) -> object:  # noqa: ARG002 - as of a run
        self._refuse()

    def step_back(self, unit: Unit, n: int = 1) -> object:  # noqa: ARG002
        self._refuse()

    def play(self, unit: Unit, per_second: float) -> object:  # noqa: ARG002
        self._refuse()

    def run_to(self, *, chunk: int, layer: int) -> object:  # noqa: ARG002
        self._refuse()

    def undo(self) -> object:
        self._refuse()

    def resume(self) -> object:
        self._refuse()

    def pause(self) -> object:
        self._refuse()

    def restart(self) -> object:
        self._refuse()

    def mend(self) -> object:
        self._refuse()

    def break_at(
        self,
        *,
        layer: int | None = None,  # noqa: ARG002
        chunk: int | None = None,  # noqa: ARG002
        rank: int | None = None,  # noqa: ARG002
        when: str | None = None,  # noqa: ARG002
        hit: int | None = None,  # noqa: ARG002
    ) -> object:
        self._refuse()


def read_only(run: object) -> str:
    """What a run that cannot move is, in words; "" for one that can."""
    return run.read_only if isinstance(run, ReadOnlyRun) else ""


def _plan_of(saved: Saved) -> Plan:
    if saved.about is not None:
        return saved.plan
    found = plan_of(saved.trace, saved.findings)
    if found is None:
        raise NotPossible(
            f"{str(saved.path)!r} has no plan of dinfer, which the desk is drawn by: it is of other code or another "
            "version. `dinfer report` draws it, and `dinfer explain` says what went wrong."
        )
    return found


def _ended_ops(plan: Plan, trace: Trace) -> list[list[int]]:
    """Where each lane stands, from the last op of it that has ended."""
    after: dict[tuple[int, str], int] = {}
    for event in trace.events:  # in the order in which they ended
        if event.index is not None and event.end:
            after[event.rank, event.lane] = event.index + 1
    return [
        [min(after.get((rank, lane.name), 0), len(lane.ops)) for lane in lanes]
        for rank, lanes in enumerate(plan.lanes)
    ]


def _new_text(saved: Saved) -> str:
    about = saved.about
    if about and about.texts:
        return "".join(about.texts[len(about.ids) :])
    return saved.findings.text or ""


def _is_compared(mark: Mark, chosen: Selection) -> bool:
    is_in = mark.rank in chosen.ranks and mark.layer in chosen.layers and mark.chunk in chosen.spans
    return is_in and mark.kind == "differs"

"""One prompt on one rank: its lanes, the cut it was sent to, the user's edits and breakpoints."""

from collections.abc import Callable, Sequence
from functools import cached_property

from dinfer.engine.board import Stand
from dinfer.engine.by_hand import Steps, op_lines, ops_between
from dinfer.engine.conditions import Conditions, Hit
from dinfer.engine.edits import Edits
from dinfer.engine.execution import Execution
from dinfer.engine.handlers import Prefill
from dinfer.engine.waits import waits_text
from dinfer.plan.cut import Cut, Cuts, Unit
from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder

Stands = Sequence[Stand | None]


class Prompt:
    """`execute` makes what runs the lanes, which tells of every op that has ended. `on_hit` learns of a breakpoint's
    condition that holds, on the lane's thread; `others` asks where all ranks stand."""

    def __init__(
        self,
        plan: Plan,
        state: Prefill,
        execute: Callable[[Callable[[Event, Op], None]], Execution],
        *,
        on_op: Callable[[Event, Op], None] | None = None,
        on_hit: Hit | None = None,
        others: Callable[[], Stands] | None = None,
    ) -> None:
        self.plan, self.state, self.rank = plan, state, state.rank
        self.edits = Edits(state, lambda: self.executor.stand().positions)
        self.conditions = Conditions(state.rank, state, on_hit or (lambda *_: None))
        self._on_op, self._others = on_op, others
        self.executor = execute(self._after)
        self._may_halt, self.order = True, 0
        self.target: Cut = tuple(tuple(0 for _ in lanes) for lanes in plan.lanes)
        self._begun: tuple[int, ...] | None = None
        """where the step by hand began whose end has not been told yet"""

    @cached_property
    def cuts(self) -> Cuts:
        return Cuts(self.plan)

    def go(self, cut: Cut, *, order: int | None = None, stopping: bool = False) -> list[str]:
        """Let this rank's lanes go to its part of a cut; what the user has edited since they stood.

        `order`: how the session names this call, by default as the one before; `stopping`: they are to get there
        whatever breakpoints say.
        """
        edited = self.look()
        with self.executor.gate.change():
            self._may_halt = not stopping
            self.order = self.order if order is None else order
            self.target, self._begun = cut, None
            self.executor.set_limits(cut[self.rank])
        return edited

    def halt(self) -> bool:
        """A breakpoint's condition holds: no further op begins here; whether the lanes may be halted just now."""
        with self.executor.gate.change():
            if self._may_halt:
                self.executor.freeze()
            return self._may_halt

    def rewind(self, cut: Cut) -> list[str]:
        """Go back to a cut; what the user has edited before."""
        edited = self.look()
        self.executor.rewind(cut[self.rank])
        self.edits.rewound()
        self.target, self._begun = cut, None
        return edited

    def step(self, unit: Unit, timeout: float) -> Steps:
        """Go on by one unit, as every rank does that makes this call; or, where the end of the step before could not be
        told, tell that."""
        begun, edited = self._begun, list[str]()
        if begun is None:
            begun = self.executor.stand().positions
            if self._has_arrived():
                edited = self.go(self.cuts.next(self.target, unit))
        self._begun = begun
        held = self.executor.wait(self._has_arrived, timeout)
        self._begun = None if held else begun
        ops = ops_between(self.executor, begun, self.executor.stand().positions)
        waits = "" if held and ops else self.waits() if not held else self._nothing_to_do()
        return Steps(self.rank, unit, op_lines(self.state, ops), waits, tuple(edited))

    def waits(self) -> str:
        """Whom this rank waits for, and where that one stands."""
        stands = list(self._others()) if self._others else []
        if len(stands) != self.plan.world_size:
            stands = [None] * self.plan.world_size
        stands[self.rank] = self.executor.stand()
        return waits_text(self.plan, self.rank, stands)

    def is_running(self) -> bool:
        """Whether a lane moves or may move."""
        stand = self.executor.stand()
        return self.executor.failure is None and (any(stand.started) or not stand.at_limits)

    def look(self) -> list[str]:
        """What the user has edited since the lanes stood, if they do."""
        stand = self.executor.stand()
        return self.edits.look() if stand.at_limits and not any(stand.started) else []

    def _nothing_to_do(self) -> str:
        if self.executor.is_done():
            return "prefill is done: there is no further step"
        return "this step has no op on this rank"

    def _has_arrived(self) -> bool:
        return self.executor.stand().positions == self.target[self.rank]

    def enter_edits(self) -> None:
        """Take in what the user has edited, if this rank stands."""
        stand = self.executor.stand()
        if stand.at_limits and not any(stand.started):
            self.edits.enter()

    def _after(self, event: Event, op: Op) -> None:
        self.edits(event, op)
        if self.state.faults.ended(op):
            self.edits.note(op.layer)
        self.conditions(event, op)
        if self._on_op:
            self._on_op(event, op)


def recorder_for(plan: Plan, rank: int, max_new_tokens: int, memory: memoryview | None) -> Recorder:
    """A rank's recorder, with a lane for decode behind the plan's: over `memory`, or with memory of its own."""
    lanes = [*(lane.name for lane in plan.lanes[rank]), "decode"]
    if memory is not None:
        recorder = Recorder.over(rank, lanes, memory)
        recorder.clear()
        return recorder
    longest = max(len(lane.ops) for lane in plan.lanes[rank])
    return Recorder(rank, lanes, 2 * max(longest, max_new_tokens) + 64)

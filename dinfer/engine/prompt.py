"""One prompt on one rank: its lanes, the cut it was sent to, the user's edits and breakpoints."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from dinfer.engine.board import Stand
from dinfer.engine.by_hand import Steps, op_lines, ops_between, waits_text
from dinfer.engine.conditions import Conditions, Hit
from dinfer.engine.lanes import LaneExecutor
from dinfer.engine.prefill import Prefill
from dinfer.kv.ledger import BlockKey
from dinfer.plan.cut import Cut, Cuts, Unit
from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder

EditMark = tuple[int, int]
"""Which tensor, and how often it was changed."""


class Edit(NamedTuple):
    """What a user had changed while the rank's lanes stood at these positions: blocks, [tokens, 2, kv_heads, head_dim],
    and hidden states, [1, tokens, hidden_size], as they were left."""

    positions: tuple[int, ...]
    kv: dict[BlockKey, Tensor]
    hidden: dict[BlockKey, Tensor]


class Edits:
    """Of one prompt on one rank. Called with every event, on the lanes' threads. `positions`: where the lanes stand."""

    def __init__(self, state: Prefill, positions: Callable[[], tuple[int, ...]] = tuple) -> None:
        self._state, self._positions = state, positions
        self.found: list[str] = []
        self.history: list[Edit] = []
        self._kv: dict[int, int] = {}
        self._hidden: dict[tuple[int, int], EditMark] = {}
        self._unsaid: list[str] = []
        self.note_all()

    def __call__(self, _: Event, op: Op) -> None:
        for value in op.makes():
            if value.what == "kv":
                self.note(value.layer)
            elif (hidden := self._state.hidden.get((value.chunk, value.layer))) is not None:
                self._hidden[value.chunk, value.layer] = _mark(hidden)

    def note(self, layer: int) -> None:
        """Take the KV of a layer as the engine's own."""
        self._kv[layer] = self._version(layer)

    def note_all(self) -> None:
        """Take what there is now as the engine's own."""
        self._kv = {layer: self._version(layer) for layer in range(self._state.cache.layers)}
        self._hidden = {key: _mark(hidden) for key, hidden in self._state.hidden.items()}

    def look(self) -> list[str]:
        """What has been changed by hand since it was last asked, in words; for a rank that stands."""
        self.enter()
        said, self._unsaid = self._unsaid, []
        return said

    def enter(self) -> None:
        """Take in what has been changed by hand since the engine's last op."""
        layers = [n for n, version in self._kv.items() if version != self._version(n)]
        states = {
            k: hidden for k, hidden in self._state.hidden.items() if self._hidden.get(k) != _mark(hidden)
        }
        changed = [f"KV of layer {n}" for n in layers]
        changed += [f"hidden c{chunk} l{layer}" for chunk, layer in states]
        if changed:
            self._keep(layers, states)  # before the ledger takes them in: it tells which blocks they are
            self._state.take_edits(layers)
            self.found += [what for what in changed if what not in self.found]
            self._unsaid += changed
            self.note_all()

    def rewound(self) -> None:
        """The rank has gone back to where it stands now; what it has kept of edits is still in force."""
        at, blocks, states = self._positions(), self._state.ledger.entries, self._state.hidden
        self.history = [
            Edit(
                tuple(map(min, edit.positions, at)),
                {key: block for key, block in edit.kv.items() if key in blocks},
                {key: hidden for key, hidden in edit.hidden.items() if key in states},
            )
            for edit in self.history
        ]
        self.note_all()

    def _keep(self, layers: list[int], states: dict[BlockKey, Tensor]) -> None:
        state = self._state
        kv = {
            (chunk, layer): block.clone()
            for chunk, layer in state.ledger.entries
            if layer in layers
            and state.ledger.changed((chunk, layer), block := state.block(chunk, layer)).any()
        }
        self.history.append(Edit(self._positions(), kv, {key: one.clone() for key, one in states.items()}))

    def _version(self, layer: int) -> int:
        return self._state.cache.tensor(layer)._version


def _mark(tensor: Tensor) -> EditMark:
    return id(tensor), tensor._version


Stands = Sequence[Stand | None]


class Prompt:
    """`execute` makes what runs the lanes, which tells of every op that has ended. `on_hit` learns of a breakpoint's
    condition that holds, on the lane's thread; `others` asks where all ranks stand."""

    def __init__(
        self,
        plan: Plan,
        state: Prefill,
        execute: Callable[[Callable[[Event, Op], None]], LaneExecutor],
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

"""One prompt on one rank: its lanes, the cut that it was sent to, the user's edits and breakpoints."""

from collections.abc import Callable, Sequence
from functools import cached_property
from threading import Lock
from typing import NamedTuple

from torch import Tensor

from dinfer.engine.board import Stand
from dinfer.engine.by_hand import Steps, blocked_on_text, op_lines, ops_between
from dinfer.engine.lanes import LaneExecutor
from dinfer.engine.prefill import Prefill
from dinfer.kv.ledger import BlockKey
from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.cut import Cut, Cuts, Unit
from dinfer.plan.ops import Op
from dinfer.trace.events import Event

Hit = Callable[[Breakpoint, Op, str], None]
"""called with a breakpoint, the op at which its condition held, and what was found there"""


class Edit(NamedTuple):
    """What the user edited while the rank's lanes stood at `positions`, as copies: blocks, [tokens, 2, kv_heads,
    head_dim], and hidden states, [1, tokens, hidden_size]."""

    positions: tuple[int, ...]
    kv: dict[BlockKey, Tensor]
    hidden: dict[BlockKey, Tensor]


class Edits:
    """Finds what the user edits in one prompt's KV and hidden states, by torch's version counters.

    torch counts in-place changes of a tensor and all its views (`_version`). What the engine's own ops leave is noted
    after each op; what differs from that at the next step was changed by hand. Bytes that arrive over gloo do not count
    up, so they need no note. Of KV the layer is known, not the rows: a memory fault in the same layer since the last
    step is taken for part of the edit.

    Called for every op that has ended, on its lane's thread. `history`: all edits so far, with their tensors.
    """

    def __init__(self, state: Prefill, positions: Callable[[], tuple[int, ...]]) -> None:
        self._state, self._positions = state, positions
        self.history: list[Edit] = []
        self.changes = 0
        """how often KV or hidden states have been changed by other than the engine's ops, or taken as they are"""
        self._kv: dict[int, int] = {}
        self._hidden: dict[BlockKey, tuple[int, int]] = {}
        self._unreported: list[str] = []
        self.accept_all()

    def __call__(self, _: Event, op: Op) -> None:
        for value in op.makes():
            if value.what == "kv":
                self.accept(value.layer)
            elif (hidden := self._state.hidden.get((value.chunk, value.layer))) is not None:
                self._hidden[value.chunk, value.layer] = _version_of(hidden)

    def accept(self, layer: int) -> None:
        """Treat the KV of a layer, as it is now, as not edited."""
        self._kv[layer] = self._state.cache.tensor(layer)._version

    def accept_all(self) -> None:
        """Treat all KV and hidden states, as they are now, as not edited."""
        self.changes += 1
        cache = self._state.cache
        self._kv = {layer: cache.tensor(layer)._version for layer in range(cache.layers)}
        self._hidden = {key: _version_of(hidden) for key, hidden in self._state.hidden.items()}

    def report(self) -> list[str]:
        """The edits since the last report, as text. Call it only while the lanes stand."""
        self.detect()
        edits, self._unreported = self._unreported, []
        return edits

    def detect(self) -> None:
        """Record what the user has edited since the engine's last op."""
        state = self._state
        layers = [n for n, version in self._kv.items() if version != state.cache.tensor(n)._version]
        hidden = {key: one for key, one in state.hidden.items() if self._hidden.get(key) != _version_of(one)}
        changed = [f"KV of layer {n}" for n in layers]
        changed += [f"hidden c{chunk} l{layer}" for chunk, layer in hidden]
        if not changed:
            return
        # Before record_edits: the edited blocks are found by the ledger's old digests.
        blocks = {key: state.block(*key) for key in state.ledger.entries if key[1] in layers}
        kv = {key: block.clone() for key, block in blocks.items() if state.ledger.changed(key, block).any()}
        self.history.append(Edit(self._positions(), kv, {key: one.clone() for key, one in hidden.items()}))
        state.record_edits(layers)
        self._unreported += changed
        self.accept_all()

    def rewound(self) -> None:
        """After the rank has gone back: drop edits of blocks and hidden states that are no longer there."""
        at, blocks, states = self._positions(), self._state.ledger.entries, self._state.hidden
        self.history = [
            Edit(
                tuple(map(min, edit.positions, at)),
                {key: block for key, block in edit.kv.items() if key in blocks},
                {key: hidden for key, hidden in edit.hidden.items() if key in states},
            )
            for edit in self.history
        ]
        self.accept_all()


def _version_of(tensor: Tensor) -> tuple[int, int]:
    """Its id, and torch's count of in-place changes to it."""
    return id(tensor), tensor._version


class Conditions:
    """The conditions of breakpoints, evaluated when an op ends, on its lane's thread; calls `on_hit` for the first that
    holds. On a GPU a condition on values waits for the device at each op that matches."""

    def __init__(self, state: Prefill, on_hit: Hit | None) -> None:
        self._state, self._on_hit = state, on_hit
        self._lock = Lock()
        self._armed: tuple[Breakpoint, ...] = ()
        self._met: dict[int, dict[Op, int]] = {}
        """by number of a breakpoint with `hit`: the ops at which its condition has held, and which in order each was"""

    def arm(self, breakpoints: Sequence[Breakpoint]) -> None:
        """Evaluate these breakpoints' conditions from now on, and no others."""
        self._armed = tuple(one for one in breakpoints if one.condition and one.enabled)

    def watch(self, op: Op) -> bool:
        """Whether one of them may hold at the op."""
        return any(one.matches(self._state.rank, op) for one in self._armed)

    def __call__(self, event: Event, op: Op) -> None:
        for one in self._armed:
            if one.matches(self._state.rank, op) and (found := self._evaluate(one, event, op)):
                with self._lock:
                    is_hit = self._is_hit(one, op)
                    if is_hit and self._on_hit:
                        self._on_hit(one, op, found)
                if is_hit:
                    return

    def _is_hit(self, one: Breakpoint, op: Op) -> bool:
        """Whether a condition that holds at this op stops the run. An op that is done again counts once."""
        if one.hit is None:
            return True
        met = self._met.setdefault(one.number, {})
        return met.setdefault(op, len(met) + 1) == one.hit

    def _evaluate(self, one: Breakpoint, event: Event, op: Op) -> str:
        """Why the condition holds, as text; empty if it does not."""
        if one.condition == "slower":
            took = event.busy / 1e6
            return f"it took {took:.3g} ms" if took > one.bound else ""
        if one.condition == "digest":
            return self._state.differing.pop((op.chunk, op.layer), "") if op.what == "kv" else ""
        for name, tensor in self._state.made_by(op):
            if one.condition == "absmax":
                if (largest := float(tensor.abs().max())) > one.bound:
                    return f"{name} reaches {largest:.4g}"
            elif count := int((tensor.isnan() if one.condition == "nan" else tensor.isinf()).sum()):
                return f"{name} holds {count} {'NaN' if one.condition == 'nan' else 'Inf'}"
        return ""


Stands = Sequence[Stand | None]


class Prompt:
    """One prompt on one rank.

    `execute(state, on_op, watched)` makes the executor of the lanes. `on_hit` is called for a breakpoint's condition
    that holds, on the lane's thread; `all_stands()` returns where each rank stands. `target`: the cut that the rank was
    sent to.
    """

    def __init__(
        self,
        state: Prefill,
        execute: Callable[[Prefill, Callable[[Event, Op], None], Callable[[Op], bool]], LaneExecutor],
        *,
        on_op: Callable[[Event, Op], None] | None,
        on_hit: Hit | None,
        all_stands: Callable[[], Stands] | None,
    ) -> None:
        self.plan, self.state, self.rank = state.plan, state, state.rank
        self.edits = Edits(state, lambda: self.executor.stand().positions)
        self.conditions = Conditions(state, on_hit)
        self._on_op, self._all_stands = on_op, all_stands
        self.executor = execute(state, self._after_op, self.conditions.watch)
        self._may_halt, self.order = True, 0
        self.target: Cut = tuple(tuple(0 for _ in lanes) for lanes in self.plan.lanes)
        self._begun: tuple[int, ...] | None = None
        """the positions at which an `engine.step` began that has not ended yet"""

    @cached_property
    def cuts(self) -> Cuts:
        return Cuts(self.plan)

    def go(self, cut: Cut, *, order: int | None = None, stopping: bool = False) -> list[str]:
        """Let this rank's lanes run to a cut. Returns the user's edits since they stopped, as text.

        `order`: the session's number of this call, by default the last one's; `stopping`: no condition halts it.
        """
        edited = self.new_edits()
        with self.executor.gate.change():
            self._may_halt = not stopping
            self.order = self.order if order is None else order
            self.target, self._begun = cut, None
            self.executor.set_limits(cut[self.rank])
        return edited

    @property
    def changes(self) -> tuple[int, int]:
        """The same as before only if since then the prompt was sent nowhere else and has not gone back, and its KV and
        hidden states are those that its ops have made, in the same memory: no edit was found, and no graft, fault or
        larger cache came."""
        return self.order, self.edits.changes

    def halt(self) -> bool:
        """Start no further op, because a condition holds. Returns False while `stopping`, when lanes must run on."""
        with self.executor.gate.change():
            if self._may_halt:
                self.executor.freeze()
            return self._may_halt

    def rewind(self, cut: Cut) -> list[str]:
        """Go back to a cut. Returns the user's edits before, as text."""
        edited = self.new_edits()
        self.executor.rewind(cut[self.rank])
        self.edits.rewound()
        self.target, self._begun = cut, None
        return edited

    def step(self, unit: Unit, timeout: float) -> Steps:
        """Step by one unit, or continue the last step; waits at most `timeout` seconds."""
        begun, edited = self._begun, list[str]()
        if begun is None:
            begun = self.executor.stand().positions
            if self._has_arrived():
                edited = self.go(self.cuts.next(self.target, unit))
        self._begun = begun
        ended = self.executor.wait(self._has_arrived, timeout)
        self._begun = None if ended else begun
        ops = ops_between(self.executor, begun, self.executor.stand().positions)
        if ended and self._all_stands:
            self._all_stands()  # answered once the session knows this rank's positions: `run.where()` can come at once
        if not ended:
            blocked_on = self.blocked_on()
        elif ops:
            blocked_on = ""
        elif self.executor.is_done():
            blocked_on = "prefill is done: there is no further step"
        else:
            blocked_on = "this step has no op on this rank"
        return Steps(self.rank, unit, op_lines(self.state, ops), blocked_on, tuple(edited))

    def blocked_on(self) -> str:
        """Which rank this one waits for and where that stands, as text; else where this rank stands."""
        stands = list(self._all_stands()) if self._all_stands else []
        if len(stands) != self.plan.world_size:
            stands = [None] * self.plan.world_size
        stands[self.rank] = self.executor.stand()
        return blocked_on_text(self.plan, self.rank, stands)

    def is_running(self) -> bool:
        """Whether a lane runs or may run."""
        return self.executor.failure is None and not self._stands()

    def new_edits(self) -> list[str]:
        """The user's edits since the last report, as text; none while lanes run."""
        return self.edits.report() if self._stands() else []

    def detect_edits(self) -> None:
        """Record the user's edits; does nothing while lanes run."""
        if self._stands():
            self.edits.detect()

    def _stands(self) -> bool:
        stand = self.executor.stand()
        return stand.at_limits and not any(stand.started)

    def _has_arrived(self) -> bool:
        return self.executor.stand().positions == self.target[self.rank]

    def _after_op(self, event: Event, op: Op) -> None:
        self.edits(event, op)
        if self.state.faults.ended(op):
            self.edits.accept(op.layer)
        self.conditions(event, op)
        if self._on_op:
            self._on_op(event, op)

"""Conditions of breakpoints, evaluated on the rank when an op ends.

On a GPU a condition on values waits for the device at each op that matches; without such breakpoints nothing waits.
"""

from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor

from dinfer.engine.prefill import Prefill
from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.ops import Op
from dinfer.trace.events import Event

Hit = Callable[[Breakpoint, Op, str], None]
"""called with a breakpoint, the op at which its condition held, and what was found there"""


class Conditions:
    """Called for every op that has ended, on its lane's thread; calls `on_hit` for the first condition that holds."""

    def __init__(self, rank: int, state: Prefill, on_hit: Hit) -> None:
        self._rank, self._state, self._on_hit = rank, state, on_hit
        self._lock = Lock()
        self._armed: tuple[Breakpoint, ...] = ()

    def arm(self, breakpoints: Sequence[Breakpoint]) -> None:
        """Evaluate these breakpoints' conditions from now on, and no others."""
        self._armed = tuple(one for one in breakpoints if one.condition)

    def __call__(self, event: Event, op: Op) -> None:
        for one in self._armed:
            if one.matches(self._rank, op) and (found := self._evaluate(one, event, op)):
                with self._lock:
                    self._on_hit(one, op, found)
                return

    def _evaluate(self, one: Breakpoint, event: Event, op: Op) -> str:
        """Why the condition holds, as text; empty if it does not."""
        if one.condition == "slower":
            took = event.busy / 1e6
            return f"it took {took:.3g} ms" if took > one.bound else ""
        if one.condition == "digest":
            return self._state.differing.pop((op.chunk, op.layer), "") if op.what == "kv" else ""
        for name, tensor in made_by(self._state, op):
            if found := _found_in(tensor, one):
                return f"{name} {found}"
        return ""


def made_by(state: Prefill, op: Op) -> list[tuple[str, Tensor]]:
    """The tensors that the op made on this rank, by name: K, V, and the hidden state if it is still needed."""
    made = []
    if op.kind == "layer" or (op.kind == "recv" and op.what == "kv"):
        block = state.block(op.chunk, op.layer)
        made += [("K", block[:, 0]), ("V", block[:, 1])]
    for value in op.makes():
        if value.what == "hidden" and (hidden := state.hidden.get((value.chunk, value.layer))) is not None:
            made.append(("hidden", hidden))
        elif value.what == "final" and state.final is not None:
            made.append(("final", state.final))
    return made


def _found_in(tensor: Tensor, one: Breakpoint) -> str:
    if one.condition == "nan":
        count = int(torch.isnan(tensor).sum())
        return f"holds {count} NaN" if count else ""
    if one.condition == "inf":
        count = int(torch.isinf(tensor).sum())
        return f"holds {count} Inf" if count else ""
    largest = float(tensor.abs().max())
    return f"reaches {largest:.4g}" if largest > one.bound else ""

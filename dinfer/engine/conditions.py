"""Conditions of breakpoints, judged on the rank by what an op has just made.

On a GPU a condition on values waits for the device at each op that it looks at; without breakpoints nothing does.
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


class Conditions:
    """Called with every event, on the lanes' threads; `on_hit` learns of the first condition that holds."""

    def __init__(self, rank: int, state: Prefill, on_hit: Hit) -> None:
        self._rank, self._state, self._on_hit = rank, state, on_hit
        self._lock = Lock()
        self._armed: tuple[Breakpoint, ...] = ()

    def arm(self, breakpoints: Sequence[Breakpoint]) -> None:
        """Look out for these, and for nothing else."""
        self._armed = tuple(one for one in breakpoints if one.condition)

    def __call__(self, event: Event, op: Op) -> None:
        for one in self._armed:
            if one.matches(self._rank, op) and (found := self._judge(one, event, op)):
                with self._lock:
                    self._on_hit(one, op, found)
                return

    def _judge(self, one: Breakpoint, event: Event, op: Op) -> str:
        """What makes the condition hold, in words; empty if it does not."""
        if one.condition == "slower":
            took = event.busy / 1e6
            return f"it took {took:.3g} ms" if took > one.bound else ""
        if one.condition == "digest":
            return self._state.differing.pop((op.chunk, op.layer), "") if op.what == "kv" else ""
        for name, tensor in made_by(self._state, op):
            if found := _look(one, tensor):
                return f"{name} {found}"
        return ""


def made_by(state: Prefill, op: Op) -> list[tuple[str, Tensor]]:
    """What the op has left on this rank, by name: the hidden state where it is still needed, K, V."""
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


def _look(one: Breakpoint, tensor: Tensor) -> str:
    if one.condition == "nan":
        count = int(torch.isnan(tensor).sum())
        return f"holds {count} NaN" if count else ""
    if one.condition == "inf":
        count = int(torch.isinf(tensor).sum())
        return f"holds {count} Inf" if count else ""
    largest = float(tensor.abs().max())
    return f"reaches {largest:.4g}" if largest > one.bound else ""

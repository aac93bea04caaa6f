"""What views need of a run, as a protocol, which runs and the doubles of tests satisfy."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dinfer.kv.view import KV
from dinfer.plan.cut import Unit
from dinfer.plan.plan import Plan
from dinfer.results import Breakpoints
from dinfer.run.state import Standing
from dinfer.trace.events import Event

Json = dict[str, Any]
"""messages of browsers and kernel"""


class Disarmed(Protocol):
    """The armed faults of a run."""

    def clear(self) -> None:
        """Disarm all."""


class InspectableRun(Protocol):
    """A run that can be shown and moved, from any thread. `last_call` is also in `standing()`.

    `standing` and `events_since` never wait for ranks. `events_since`: the events after those already `read` ([] at
    first), and the next `read`. `on_change`: call `callback`, on any thread, when `standing()` may have changed; it
    returns a function that ends this. `chunk_labels`: the text of each chunk, "" if unknown.

    The others may take long, and raise exceptions whose message is meant for users. `pause` also works during another
    thread's step; `kv` waits until the run is not moving; `mend` does what `standing().remedy` says.
    """

    last_call: str

    @property
    def plan(self) -> Plan: ...
    @property
    def world_size(self) -> int: ...
    @property
    def breakpoints(self) -> Breakpoints: ...
    @property
    def faults(self) -> Disarmed: ...

    def standing(self) -> Standing: ...
    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]: ...
    def chunk_labels(self) -> Sequence[str]: ...
    def events_since(self, read: Sequence[int]) -> tuple[list[Event], list[int]]: ...

    def step(self, unit: Unit, n: int = 1) -> object: ...
    def step_back(self, unit: Unit, n: int = 1) -> object: ...
    def play(self, unit: Unit, per_second: float) -> object: ...
    def run_to(self, *, chunk: int, layer: int) -> object: ...
    def undo(self) -> object: ...
    def resume(self) -> object: ...
    def pause(self) -> object: ...
    def restart(self) -> object: ...
    def mend(self) -> object: ...
    def break_at(
        self,
        *,
        layer: int | None = None,
        chunk: int | None = None,
        rank: int | None = None,
        when: str | None = None,
        hit: int | None = None,
    ) -> object: ...
    def verdict(self) -> object: ...
    def compare(self, what: Any, /) -> object: ...
    def kv(self, *, layer: int | None = None) -> KV: ...

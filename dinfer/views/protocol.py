"""What views need of a run, as protocols, which runs and the doubles of tests satisfy."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from dinfer.kv.difference import Diff
from dinfer.kv.source import ViewableSource
from dinfer.plan.cut import Unit
from dinfer.plan.plan import Plan
from dinfer.results import Breakpoints
from dinfer.run.state import Mark
from dinfer.trace.events import Event
from dinfer.verdict.where import RankStand

Json = dict[str, Any]
"""messages of browsers and kernel"""

RunStateName = Literal["starting", "paused", "running", "decoding", "done", "failed", "closed"]


class RunView(Protocol):
    """A run at one moment. Sequences by rank have an entry for each rank."""

    @property
    def stands(self) -> Sequence[RankStand]:
        """Where each rank's lanes stand."""

    @property
    def state(self) -> RunStateName:
        """What the run as a whole does."""

    @property
    def message(self) -> str:
        """What the user should know at once (a breakpoint hit, a failure); "" for nothing."""

    @property
    def decoded(self) -> int:
        """Tokens generated so far."""

    @property
    def text(self) -> str:
        """The text of these tokens."""

    @property
    def devices(self) -> Sequence[str]:
        """The device of each rank."""

    @property
    def alive(self) -> Sequence[bool]:
        """Whether each rank's process runs and answers."""

    @property
    def last_call(self) -> str:
        """The Python call of the last action."""

    @property
    def faults(self) -> Sequence[str]:
        """A line for each armed fault: what it breaks, and whether it has struck."""

    @property
    def marks(self) -> Sequence[Mark]:
        """Notes on single blocks."""

    @property
    def memory(self) -> Sequence[int | None]:
        """Bytes of host memory of each rank's process; None for a rank without a process of its own."""

    @property
    def device_memory(self) -> Sequence[tuple[int, int, int] | None]:
        """GPU bytes of each rank: in tensors, reserved by torch, total; None without a GPU."""

    @property
    def tokens(self) -> Sequence[int]:
        """The number of new tokens of each rank."""

    @property
    def verdict(self) -> str:
        """The verdict on why the run does not move; "" for none."""

    @property
    def over(self) -> str:
        """Why this run cannot be moved any more, and what to do; "" while it can."""


class Disarmed(Protocol):
    """The armed faults of a run."""

    def clear(self) -> None:
        """Disarm all."""


class Kv(Protocol):
    """The KV of a run that is not moving."""

    def source(self) -> ViewableSource:
        """The source of values."""

    def diff(self) -> Diff:
        """The differences between ranks."""


class InspectableRun(Protocol):
    """A run that can be shown and moved, from any thread. `last_call` is also in `standing()`."""

    last_call: str

    @property
    def plan(self) -> Plan:
        """The plan of all ranks."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    def standing(self) -> RunView:
        """The run now; never waits for ranks."""

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback`, on any thread, when `standing()` may have changed. Returns a function that ends this."""

    def chunk_labels(self) -> Sequence[str]:
        """The text of each chunk; "" if unknown."""

    def events_since(self, read: Sequence[int]) -> tuple[list[Event], list[int]]:
        """The events after those already `read` ([] at first), and the next `read`; never waits."""

    @property
    def breakpoints(self) -> Breakpoints:
        """The breakpoints, by number."""

    @property
    def faults(self) -> Disarmed:
        """The armed faults."""

    # Each of these may take long, and raises exceptions whose message is meant for users.

    def step(self, unit: Unit, n: int = 1) -> object:
        """Move forward by `n` units."""

    def step_back(self, unit: Unit, n: int = 1) -> object:
        """Go back by `n` units."""

    def play(self, unit: Unit, per_second: float) -> object:
        """Step at that pace until a breakpoint, the end, or a pause."""

    def run_to(self, *, chunk: int, layer: int) -> object:
        """Run until all ranks hold that block."""

    def resume(self) -> object:
        """Run freely."""

    def pause(self) -> object:
        """Stop at the nearest cut; also works during another thread's step."""

    def restart(self) -> object:
        """Begin again."""

    def break_at(
        self,
        *,
        layer: int | None = None,
        chunk: int | None = None,
        rank: int | None = None,
        when: str | None = None,
    ) -> object:
        """Set a breakpoint; None for any."""

    def verdict(self) -> object:
        """Why the run does not move."""

    def kv(self, *, layer: int | None = None) -> Kv:
        """The KV of one layer or all; waits until the run is not moving."""

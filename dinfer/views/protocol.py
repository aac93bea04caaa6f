"""What views need of a run, and nothing more; the session's run has it, and so have the tests' doubles."""

from collections.abc import Callable, Sequence
from typing import Protocol

from dinfer.kv.difference import Diff
from dinfer.kv.source import ViewableSource
from dinfer.plan.cut import Unit
from dinfer.plan.plan import Plan
from dinfer.results import Breakpoints
from dinfer.run.state import Mark
from dinfer.trace.events import Event
from dinfer.verdict.where import RankStand


class RunView(Protocol):
    """One moment of a run. Everything by rank has an entry for each."""

    @property
    def stands(self) -> Sequence[RankStand]:
        """Where each rank's lanes stand."""

    @property
    def state(self) -> str:
        """What the run as a whole is doing: a `dinfer.run.state.State`."""

    @property
    def message(self) -> str:
        """What a person should know at once (a breakpoint hit, a failure), or nothing."""

    @property
    def decoded(self) -> int:
        """Tokens generated so far."""

    @property
    def text(self) -> str:
        """What they read as."""

    @property
    def devices(self) -> Sequence[str]:
        """Where each rank computes."""

    @property
    def alive(self) -> Sequence[bool]:
        """Whether each rank's process lives and answers."""

    @property
    def last_call(self) -> str:
        """The Python call of the last action, whoever made it."""

    @property
    def faults(self) -> Sequence[str]:
        """A line for each fault that is armed: what it breaks on purpose, and whether it has struck."""

    @property
    def marks(self) -> Sequence[Mark]:
        """What is known of single blocks."""

    @property
    def memory(self) -> Sequence[int | None]:
        """Bytes that each rank's process has in its host's memory; None where it has none of its own."""

    @property
    def device_memory(self) -> Sequence[tuple[int, int, int] | None]:
        """Bytes of its GPU that each rank's tensors have, that its torch keeps, and all; None where it has no GPU."""

    @property
    def tokens(self) -> Sequence[int]:
        """How many new tokens each rank has."""

    @property
    def verdict(self) -> str:
        """Why the run does not move, at length, once that was told."""

    @property
    def over(self) -> str:
        """Why nothing moves this run any more, and what to do, once that is so."""


class Disarmed(Protocol):
    """What ends faults."""

    def clear(self) -> None:
        """Disarm all."""


class Kv(Protocol):
    """The KV of a run that stands."""

    def source(self) -> ViewableSource:
        """Where values come from."""

    def diff(self) -> Diff:
        """Where the ranks differ."""


class InspectableRun(Protocol):
    """A run that can be looked at and moved. Safe to call from any thread. `last_call` is what `standing()` says."""

    last_call: str

    @property
    def plan(self) -> Plan:
        """What the ranks do."""

    @property
    def world_size(self) -> int:
        """How many ranks there are."""

    def standing(self) -> RunView:
        """The run now; returns at once, whatever the ranks do."""

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back, on any thread, whenever `standing()` may differ; what this returns ends that."""

    def chunk_labels(self) -> Sequence[str]:
        """The text of each chunk's tokens; empty where it is not known."""

    def events_since(self, read: Sequence[int]) -> tuple[list[Event], list[int]]:
        """The events after those that have been `read`, nothing at first, and what to give next time; at once."""

    @property
    def breakpoints(self) -> Breakpoints:
        """Those that are set, by number."""

    @property
    def faults(self) -> Disarmed:
        """Those that are armed."""

    # Each of these may take long, and raises exceptions whose message is meant for people.

    def step(self, unit: Unit, n: int = 1) -> object:
        """Move on by `n` units."""

    def step_back(self, unit: Unit, n: int = 1) -> object:
        """Go back by `n` units."""

    def play(self, unit: Unit, per_second: float) -> object:
        """Step by units at that pace until a breakpoint, the end, or a pause."""

    def run_to(self, *, chunk: int, layer: int) -> object:
        """Stop just after that block is everywhere."""

    def resume(self) -> object:
        """Let it run."""

    def pause(self) -> object:
        """Stop at the nearest cut, also while another thread's step is under way."""

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
        """Why it does not move."""

    def kv(self, *, layer: int | None = None) -> Kv:
        """What the ranks hold, of one layer or all; waits until the run stands."""

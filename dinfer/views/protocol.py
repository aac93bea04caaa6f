"""What views need of a run, and nothing more; the session's run has it, and so have the tests' doubles."""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from dinfer.plan.cut import Unit
from dinfer.plan.plan import Plan
from dinfer.session.runs.where import Stand

State = Literal["starting", "paused", "running", "decoding", "done", "failed", "closed"]


class Standing(Protocol):
    """One moment of a run. Everything by rank has an entry for each."""

    @property
    def stands(self) -> Sequence[Stand]:
        """Where each rank's lanes stand."""

    @property
    def state(self) -> State:
        """What the run as a whole does."""

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


class Run(Protocol):
    """A run that can be looked at and moved. Safe to call from any thread."""

    @property
    def plan(self) -> Plan:
        """What the ranks do."""

    @property
    def world_size(self) -> int:
        """How many ranks there are."""

    def standing(self) -> Standing:
        """The run now; returns at once, whatever the ranks do."""

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back, on any thread, whenever `standing()` may differ; what this returns ends that."""

    def chunk_labels(self) -> Sequence[str]:
        """The text of each chunk's tokens; empty where it is not known."""

    # Each of these may take long, and raises exceptions whose message is meant for people.

    def step(self, unit: Unit, n: int = 1) -> object:
        """Move on by `n` units."""

    def step_back(self, unit: Unit, n: int = 1) -> object:
        """Go back by `n` units."""

    def run_to(self, *, chunk: int, layer: int) -> object:
        """Stop just after that block is everywhere."""

    def resume(self) -> object:
        """Let it run."""

    def pause(self) -> object:
        """Stop at the nearest cut, also while another thread's step is under way."""

    def restart(self) -> object:
        """Begin again."""

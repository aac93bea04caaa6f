"""Signs of life: all that is known of one rank at one moment, as plain data. `monitor` gathers them.

Seconds are ages: how long something has been so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dinfer.plan.ops import Op, Value
from dinfer.trace.events import place_of

BUSY = "busy"
"""instead of a lane's name: of a rank that does not answer, the thread that is in an op and not in the transport"""


class StackFrame(NamedTuple):
    """Where a thread's Python stands. `native`: the line has called into C; `waits`: it waits in dinfer's transport or
    at a gate, as it should; `held`: a debugger has stopped it; `c`: the C functions that it is in, if known."""

    file: str
    line: int
    function: str
    text: str = ""
    native: bool = False
    waits: bool = False
    held: bool = False
    c: str = ""

    def __str__(self) -> str:
        """For example `time.sleep(60)` in forward (model.py:12)."""
        place = place_of(self.file, self.line)
        return f"`{self.text}` in {self.function} ({place})" if self.text else f"{self.function} ({place})"


class Came(NamedTuple):
    """What the header of an unexpected message said. `here`: the plan id of the rank that received it, 0 if unknown."""

    value: Value
    tokens: int
    nbytes: int
    plan_id: int
    here: int = 0


class Raised(NamedTuple):
    """An exception on a rank. `op`: the op that raised it, as text, if any; `secondary`: it follows from a lost peer;
    `came`: the message that caused it; `handled`: the program caught it and went on, so that it is a failure only if
    the rank then does not come to where others wait for it."""

    message: str
    op: str = ""
    lane: str = ""
    secondary: bool = False
    came: Came | None = None
    handled: bool = False


@dataclass(frozen=True)
class Signs:
    """One rank. By lane: `positions`, `started`, `limits` as on the rank's board, and `still_s`.

    `quiet_s`: since the rank has sent news. `process`: the state letter of its process, as in /proc; `ended`: how the
    process ended, "" while it lives. `cpu_moves`: whether it has used CPU time lately; `answers`: whether its Python
    answered the last question; None: unknown. `frames`: by lane name; `medians`: seconds by op kind; `links`: seconds
    of a block, by the rank that sends it. `empty`: (lane, index) of transfers that ended without any bytes; `full`: of
    recvs that are known to have ended with theirs. `holder`: the lane whose thread keeps Python from answering, if that
    is known. `outside`, `child`: what it waits for that is no part of the run, in words, for example `a connection`,
    and which of its child processes; "" if nothing says so. `between_cells`: its phase is "done" since a
    notebook's cell has ended, and another may come."""

    positions: tuple[int, ...] = ()
    started: tuple[bool, ...] = ()
    limits: tuple[int, ...] = ()
    still_s: tuple[float, ...] = ()
    quiet_s: float = 0.0
    phase: str = "prefill"
    decoded: int = 0
    process: str | None = None
    cpu_moves: bool | None = None
    answers: bool | None = None
    ended: str = ""
    raised: Raised | None = None
    plan_id: int | None = None
    frames: Mapping[str, StackFrame] = field(default_factory=dict)
    holder: str = ""
    medians: Mapping[str, float] = field(default_factory=dict)
    links: Mapping[int, float] = field(default_factory=dict)
    empty: frozenset[tuple[int, int]] = frozenset()
    full: frozenset[tuple[int, int]] = frozenset()
    outside: str = ""
    child: str = ""
    between_cells: bool = False

    @property
    def left(self) -> str:
        """What ended, in words, where the phase is "done"."""
        return "has ended its cell" if self.between_cells else "has ended"

    @property
    def is_stopped(self) -> bool:
        """Whether a signal or a debugger has stopped its process."""
        return self.process in ("T", "t")


class KvBytes(NamedTuple):
    """Bytes of one token's K and V of one layer, and of its hidden state; 0: unknown."""

    kv: int = 0
    hidden: int = 0

    def of(self, op: Op) -> int:
        """The bytes that a transfer carries."""
        return op.tokens * (self.kv if op.what == "kv" else self.hidden)

"""Signs of life: all that is known of one rank at one moment, as plain data. How it is gathered is for others.

Seconds are ages: how long something has been so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dinfer.plan.ops import Op, Value

STOPPED = ("T", "t")
"""letters of a process that a signal or a debugger has stopped"""

BUSY = "busy"
"""in place of a lane's name: the thread of a rank, which does not answer, that is in an op and not in the transport"""


class StackFrame(NamedTuple):
    """Where a thread's Python stands. `native`: the line has called into C; `waits`: it waits in dinfer's own transport
    or at a gate, as it should; `held`: a debugger holds it; `c`: the C functions in which it is, if known."""

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
        place = f"{self.file.rpartition('/')[2]}:{self.line}"
        return f"`{self.text}` in {self.function} ({place})" if self.text else f"{self.function} ({place})"


class Came(NamedTuple):
    """What a message said of itself that was not the one expected. `here`: the id of the plan of who got it, where
    that is known."""

    value: Value
    tokens: int
    nbytes: int
    plan_id: int
    here: int = 0


class Raised(NamedTuple):
    """An exception on a rank. `op`: the text of the op in which, if in one; `secondary`: what a lost peer does to
    others; `came`: the message because of which."""

    message: str
    op: str = ""
    lane: str = ""
    secondary: bool = False
    came: Came | None = None


@dataclass(frozen=True)
class Signs:
    """One rank. By lane: `positions`, `started`, `limits` as a board has them, and `still_s`.

    `ended`: how its process ended, "" while it lives. `cpu_moves`: whether its CPU time has moved lately; `answers`:
    whether its Python has answered when asked lately; None: not known. `frames` are by lane name, `medians` seconds by
    op kind, `links` those of a block from each rank. `empty`: (lane, index) of transfers that have ended though no
    bytes moved; `full`: of recvs that are known to have ended with theirs. `holder`: the lane whose thread keeps a rank
    that does not answer from doing so, where that is known.
    """

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

    @property
    def is_stopped(self) -> bool:
        return self.process in STOPPED


class KvBytes(NamedTuple):
    """Bytes of one token's K and V of one layer, and of its hidden state; 0: not known."""

    kv: int = 0
    hidden: int = 0

    def of(self, op: Op) -> int:
        return op.tokens * (self.kv if op.what == "kv" else self.hidden)

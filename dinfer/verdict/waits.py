"""The graph of who waits for whom: its nodes, and what is wrong at those that wait for nobody."""

from math import inf
from typing import Literal, NamedTuple

from dinfer.plan.ops import Op

HangKind = Literal[
    "exception",
    "dead",
    "stopped",
    "another plan",
    "other size",
    "wrong peer",
    "sent twice",
    "out of order",
    "never sent",
    "never received",
    "cycle",
    "stuck in Python",
    "stuck in C",
    "stuck",
    "stalled link",
    "lost peer",
    "computing",
    "slow rank",
    "slow link",
    "moving",
    "held",
    "paused",
    "done",
]
"""what a root may be, the first to be named first"""

HUNG = frozenset[HangKind](
    (
        "exception", "dead", "stopped", "another plan", "other size", "wrong peer", "sent twice", "out of order",
        "never sent", "never received", "cycle", "stuck in Python", "stuck in C", "stuck", "stalled link", "lost peer",
    )
)  # fmt: skip
"""those with which a run does not go on by itself"""

STUCK_S = 5.0

STUCK_TIMES = 5.0

CYCLE_S = 1.0
"""Positions prove a cycle; ranks may only have been seen at different moments."""

RANK = -1
"""in place of a lane: the rank as a whole"""


def stuck_after(median: float) -> float:
    """Seconds without progress, with CPU time still, after which an op counts as stuck."""
    return max(STUCK_S, STUCK_TIMES * median)


class Node(NamedTuple):
    """One lane of one rank, by number, or the rank as a whole."""

    rank: int
    lane: int = RANK


class Root(NamedTuple):
    """What is wrong. `text` says it of rank `rank`, after `rank N`; `peer`: the other rank in it, if there is one."""

    kind: HangKind
    rank: int
    text: str
    peer: int | None = None


class Wait(NamedTuple):
    """What one node does. `on`: for whom it waits; `root`: what is wrong, where it waits for nobody. `detail`: size and
    link of what it waits for. `what`: that itself, in a few words."""

    node: Node
    text: str
    still_s: float
    on: tuple[Node, ...] = ()
    root: Root | None = None
    op: Op | None = None
    detail: str = ""
    what: str = ""

    def __str__(self) -> str:
        told = f", for {self.still_s:.1f} s" if self.still_s < inf else ", till the record ends"
        since = told if self.still_s >= 0.05 and self.on else ""
        return f"{self.text}{f' ({self.detail})' if self.detail else ''}{since}"


Waits = dict[Node, Wait]

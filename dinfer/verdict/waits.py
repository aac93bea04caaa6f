"""The graph of who waits for whom: its nodes, and what is wrong at those that wait for no other (the roots)."""

from math import inf
from typing import Literal, NamedTuple, get_args

from dinfer.plan.ops import Op

HangKind = Literal[
    "exception", "dead", "stopped", "another plan", "other size", "wrong peer", "sent twice", "out of order",
    "never sent", "never received", "never joined", "cycle", "stuck in Python", "stuck in C", "stuck", "stalled link",
    "lost peer", "computing", "slow rank", "slow link", "idle", "moving", "held", "paused", "done",
]  # fmt: skip
"""the kinds of roots, the worst first"""

KINDS: tuple[HangKind, ...] = get_args(HangKind)

HUNG = frozenset(KINDS[: KINDS.index("computing")])
"""kinds with which a run will not go on by itself"""

SLOW = frozenset[HangKind]({"computing", "slow rank", "slow link"})
"""kinds with which it goes on, but later; `idle`: once somebody outside of the run asks for something"""

STUCK_S = 5.0

STUCK_TIMES = 5.0
"""an op is stuck after so many seconds, and so many times its usual duration"""

CYCLE_S = 1.0
"""for how long a cycle must have lasted, since the ranks' positions may be of different moments"""

RANK = -1
"""instead of a lane's number: the rank as a whole"""


def stuck_after(median: float) -> float:
    """Seconds without progress or CPU time after which an op counts as stuck."""
    return max(STUCK_S, STUCK_TIMES * median)


class Node(NamedTuple):
    """One lane of one rank, by number, or the rank as a whole."""

    rank: int
    lane: int = RANK


class Root(NamedTuple):
    """What is wrong on a rank. `text` goes on after `rank N`; `peer`: the other rank concerned, if any."""

    kind: HangKind
    rank: int
    text: str
    peer: int | None = None


class Wait(NamedTuple):
    """What one node does. `on`: the nodes that it waits for; `root`: what is wrong, if it waits for none. `what`: what
    it waits for, in a few words; `detail`: the size and link of that."""

    node: Node
    text: str
    still_s: float
    on: tuple[Node, ...] = ()
    root: Root | None = None
    op: Op | None = None
    detail: str = ""
    what: str = ""

    def __str__(self) -> str:
        text = f", for {self.still_s:.1f} s" if self.still_s < inf else ", until the record ends"
        since = text if self.still_s >= 0.05 and self.on else ""
        return f"{self.text}{f' ({self.detail})' if self.detail else ''}{since}"


Waits = dict[Node, Wait]

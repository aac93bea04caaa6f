"""Runs of a plan that are broken on purpose in the naive game, and what a session would see of them. Not a test."""

from __future__ import annotations

from dataclasses import replace

from dinfer.plan.ops import Op
from dinfer.plan.partition import partition
from dinfer.plan.plan import OpPlace, Plan
from dinfer.plan.schedule import build
from dinfer.verdict.signs import Signs, StackFrame
from tests.support.plan_game import Game, Lane

LONG_S = 60.0
SLEEPS = StackFrame("/models/model.py", 12, "forward", "time.sleep(60)")
CALLS_C = StackFrame("/models/model.py", 14, "forward", "library.wait()", native=True)
WAITS = StackFrame("/dinfer/transport/gloo.py", 80, "send", "work.wait()", waits=True)


def lockstep(world_size: int = 2) -> Plan:
    """Two chunks, two layers a rank, one lane a rank."""
    return build(
        partition(layers=2 * world_size, tokens=8, world_size=world_size, chunk_size=4),
        "lockstep",
        "pairwise",
    )


def pipelined(world_size: int = 3) -> Plan:
    return build(
        partition(layers=2 * world_size, tokens=8, world_size=world_size, chunk_size=4),
        "pipelined",
        "pairwise",
    )


class FaultyGame(Game):
    """The game with one fault: lanes that never end an op (`frozen`), or a send that moves on and sends nothing."""

    def __init__(
        self,
        plan: Plan,
        *,
        seed: int,
        frozen: set[OpPlace] | None = None,
        dropped: OpPlace | None = None,
        rank: int = -1,
    ) -> None:
        super().__init__(plan, rendezvous=True, seed=seed)
        self.frozen, self.dropped, self.dead = frozen or set(), dropped, rank
        self.lost: list[Op] = []

    def can_move(self, lane: Lane) -> bool:
        if self.is_frozen(lane):
            return False
        if self.is_dropped(lane):
            return self.is_ready(lane)
        there = (
            self.partner(lane) if (op := self.head(lane)) and op.is_transfer and self.is_ready(lane) else None
        )
        return super().can_move(lane) and (there is None or not self.is_frozen(there))

    def move(self, lane: Lane) -> None:
        if self.is_dropped(lane):
            op = self.head(lane)
            assert op
            self.lost.append(op)
            self.end(lane)
        else:
            super().move(lane)

    def partner(self, lane: Lane) -> Lane | None:
        there = super().partner(lane)
        return None if there is not None and self.is_dropped(there) else there

    def is_frozen(self, lane: Lane) -> bool:
        return lane[0] == self.dead or OpPlace(*lane, self.at[lane]) in self.frozen

    def is_dropped(self, lane: Lane) -> bool:
        return OpPlace(*lane, self.at[lane]) == self.dropped


def signs_of(game: Game, still_s: float = LONG_S) -> list[Signs]:
    """What is seen of a game in which nothing has moved for so long; all processes sleep."""
    found = []
    for rank, lanes in enumerate(game.plan.lanes):
        numbers = range(len(lanes))
        found.append(
            Signs(
                positions=tuple(game.at[rank, n] for n in numbers),
                started=tuple(game.is_ready((rank, n)) for n in numbers),
                limits=game.limits[rank],
                still_s=(still_s,) * len(lanes),
                quiet_s=still_s,
                process="S",
                cpu_moves=False,
            )
        )
    return found


def changed(signs: list[Signs], rank: int, **values: object) -> list[Signs]:
    return [replace(its, **values) if number == rank else its for number, its in enumerate(signs)]  # type: ignore[arg-type]

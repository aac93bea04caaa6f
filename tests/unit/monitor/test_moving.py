"""A rank that moves on while it is asked where it stands is not called stuck: what is judged is of one moment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from dinfer.cluster.ranks import RankState, RankStates
from dinfer.config import Config
from dinfer.engine.board import Stand
from dinfer.job import Job
from dinfer.monitor import watch
from dinfer.monitor.signs import CPU_LEAST_S
from dinfer.monitor.stacks import Stacks
from dinfer.monitor.watch import HangWatch
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.verdict.signs import StackFrame

PLAN = build(partition(layers=6, tokens=8, world_size=3, chunk_size=4), "lockstep", "pairwise")
SPEC = SimpleNamespace(kv_heads=1, head_dim=4, hidden_size=8, dtype="float32")
JOB = cast(Job, SimpleNamespace(plan=PLAN, config=Config(world_size=3), spec=SPEC))
LONG_S = 9.0


def standing(rank: int, position: int) -> Stand:
    """On its first lane in that op, elsewhere before the first."""
    lanes = PLAN.lanes[rank]
    first = (position, *[0] * (len(lanes) - 1))
    return Stand(first, tuple(n == 0 for n in range(len(lanes))), tuple(len(lane.ops) for lane in lanes))


@pytest.mark.parametrize("moves", [False, True])
def test_who_moves_on_while_it_is_asked_is_not_stuck(monkeypatch: pytest.MonkeyPatch, moves: bool) -> None:
    now, line = time.monotonic(), RankStates(3)
    for rank, state in enumerate(line.ranks):
        state.stand, state.phase, state.process, state.cpu_s = standing(rank, 0), "prefill", "S", 1.0
        state.heard, state.progressed = now, now - LONG_S
    watcher = HangWatch(JOB, line)
    for rank in range(3):
        watcher._track.note_cpu(rank, now - 2 * CPU_LEAST_S, 1.0)

    def asked(ranks: RankStates, which: Sequence[int]) -> dict[int, Stacks]:
        """Where the ranks' threads stand, which has taken a while."""
        if moves:
            for rank in which:
                move_on(ranks.ranks[rank], rank)
        frame = StackFrame("own.py", 7, "work", "spin()")
        return {
            rank: Stacks({PLAN.lanes[rank][0].name: frame}, "…", answers=True, cpu_s=1.0) for rank in which
        }

    monkeypatch.setattr(watch, "gather", asked)
    watcher.look(decoding=False, ended={})
    if moves:
        assert watcher.found is None
    else:
        assert watcher.found
        assert watcher.found.is_hung


def move_on(state: RankState, rank: int) -> None:
    state.stand, state.progressed = standing(rank, 1), time.monotonic()

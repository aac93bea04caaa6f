"""The watch judges one moment, and waits for stacks that are on their way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from threading import Timer
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dinfer.cluster.ranks import ASK_S, RankState, RankStates
from dinfer.config import Config
from dinfer.engine.board import Stand
from dinfer.job import Job
from dinfer.messages import Command, DumpStacks, Reply, SpiedThreads, SpyOnRank, StackDump
from dinfer.monitor import stacks, watch
from dinfer.monitor.signs import CPU_LEAST_S
from dinfer.monitor.stacks import Stacks
from dinfer.monitor.watch import HangWatch
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.verdict.signs import StackFrame
from tests.support.runs import wait_for

PLAN = build(partition(layers=6, tokens=8, world_size=3, chunk_size=4), "lockstep", "pairwise")
SPEC = SimpleNamespace(kv_heads=1, head_dim=4, hidden_size=8, dtype="float32")
JOB = cast(Job, SimpleNamespace(plan=PLAN, config=Config(world_size=3), spec=SPEC))
LONG_S = 9.0


def standing(rank: int, position: int) -> Stand:
    """On its first lane in that op, elsewhere before the first."""
    lanes = PLAN.lanes[rank]
    first = (position, *[0] * (len(lanes) - 1))
    return Stand(first, tuple(n == 0 for n in range(len(lanes))), tuple(len(lane.ops) for lane in lanes))


class Asked(RankStates):
    """Three ranks that have not moved for long; they are asked, and answer what a test has them answer."""

    def __init__(self) -> None:
        super().__init__(3)
        self.sent: list[tuple[int, Command[Any], int]] = []
        now = time.monotonic()
        for rank, state in enumerate(self.ranks):
            state.stand, state.phase, state.process, state.cpu_s = standing(rank, 0), "prefill", "S", 1.0
            state.heard, state.progressed = now, now - LONG_S

    def _send(self, rank: int, command: Command[Any], number: int) -> None:
        self.sent.append((rank, command, number))


def watch_over(ranks: Asked) -> HangWatch:
    """A watch that knows that no rank has used CPU time for a while."""
    watcher, now = HangWatch(JOB, ranks), time.monotonic()
    for rank in range(3):
        watcher._track.add_cpu(rank, now - 2 * CPU_LEAST_S, 1.0)
    return watcher


def answered(rank: int) -> Stacks:
    frame = StackFrame("own.py", 7, "work", "spin()")
    return Stacks({PLAN.lanes[rank][0].name: frame}, "…", answers=True, cpu_s=1.0)


@pytest.mark.parametrize("moves", [False, True])
def test_who_moves_on_while_it_is_asked_is_not_stuck(monkeypatch: pytest.MonkeyPatch, moves: bool) -> None:
    watcher = watch_over(Asked())

    def asked(ranks: RankStates, which: Sequence[int]) -> dict[int, Stacks]:
        """Where the ranks' threads stand, which has taken a while."""
        if moves:
            for rank in which:
                move_on(ranks.ranks[rank], rank)
        return {rank: answered(rank) for rank in which}

    monkeypatch.setattr(watch, "gather", asked)
    watcher.look(decoding=False, ended={})
    if moves:
        assert watcher.found is None
    else:
        assert watcher.found
        assert watcher.found.is_hung


def test_a_verdict_waits_for_a_stack_that_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that do not answer, of which no dump can be read, and py-spy, which looks at them for a while."""
    ranks = Asked()
    watcher = watch_over(ranks)
    monkeypatch.setattr(watch, "gather", lambda _, which: {rank: Stacks(answers=False) for rank in which})
    for name in ("LOOK_S", "JUDGE_S", "ASK_S"):
        monkeypatch.setattr(watch, name, 0.0)

    def look() -> None:
        watcher.look(decoding=False, ended={})

    look()
    assert watcher.found is None
    spied = [(rank, number) for rank, command, number in ranks.sent if isinstance(command, SpyOnRank)]
    assert spied
    for _ in range(5):
        look()
        assert watcher.found is None
    for rank, number in spied:
        ranks.take(rank, Reply(number, SpiedThreads(())))
    wait_for(lambda: look() or watcher.found, "it is told without")  # type: ignore[func-returns-value]
    assert watcher.found
    assert watcher.found.kind == "stuck in C"
    assert "no stack of it could be read" in watcher.found.sentence


@pytest.mark.parametrize("answers", [True, False])
def test_dumps_are_awaited_while_the_watcher_is_heard(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    ranks, text = Asked(), 'File "own.py", line 7 in work'
    monkeypatch.setattr(stacks, "ANSWER_S", 0.0)
    monkeypatch.setattr(stacks, "WATCHER_S", 600.0 if answers else -1.0)

    def sent(rank: int, command: Command[Any], number: int) -> None:
        if isinstance(command, DumpStacks) and answers:
            Timer(3 * ASK_S, partial(ranks.take, rank, Reply(number, StackDump(text)))).start()

    monkeypatch.setattr(ranks, "_send", sent)
    found = stacks.gather(ranks, [1])
    assert (found[1].text, found[1].answers) == (text if answers else "", False)


def move_on(state: RankState, rank: int) -> None:
    state.stand, state.progressed = standing(rank, 1), time.monotonic()

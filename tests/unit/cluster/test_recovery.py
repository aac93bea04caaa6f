"""Whoever is blocked by a living rank comes free: for every state in which a run can be when a rank is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.cluster import recovery
from dinfer.cluster.ranks import LOST
from dinfer.cluster.recovery import counterparts, recover
from dinfer.config import Config
from dinfer.engine.board import Stand
from dinfer.messages import (
    Answer,
    BegunTokens,
    Command,
    Freeze,
    JoinGroup,
    LeaveGroup,
    LeftGroup,
    LimitDecode,
    Ok,
    OpenStore,
    Reply,
    StoreAddress,
)
from dinfer.model.decoder import Decoder
from dinfer.plan.graph import Channel, channel_of
from dinfer.plan.ops import Op
from dinfer.plan.plan import OpPlace, Plan
from dinfer.session.connect import connect
from dinfer.transport.gloo import drain
from tests.support.bare_ranks import BareRanks
from tests.support.plan_game import Broken, Game
from tests.support.plan_strategies import plans, reordered_plans
from tests.support.seeded_gate import SeededGate
from tests.support.twin import Twin, prompt

IDS = list(prompt(10))
SEEDS = st.integers(0, 9999)
WAIT_S = 120.0


@st.composite
def broken_games(draw: st.DrawFn) -> tuple[Game, set[int]]:
    """A run somewhere on its way, of a plan that may hang, and the ranks that live."""
    plan = draw(plans() | reordered_plans())
    game = Game(plan, rendezvous=True, seed=draw(SEEDS))
    with suppress(Broken):  # two ends that do not fit together: a rank fails there
        game.play(steps=draw(st.none() | st.integers(0, sum(1 for _ in plan.places()))))
    return game, draw(st.sets(st.integers(0, plan.world_size - 1)))


@given(broken_games())
def test_every_transfer_between_living_ranks_meets_exactly_one_end(broken: tuple[Game, set[int]]) -> None:
    game, living = broken
    begun = game.begun()
    posts = counterparts(game.plan, stands(game, begun, living))
    assert posts.keys() <= living
    sends, recvs = Counter[Channel](), Counter[Channel]()
    for place in begun:
        op = game.plan.op(place)
        if op.is_transfer and place.rank in living and op.peer in living:
            (sends if op.kind == "send" else recvs)[channel_of(place.rank, op)] += 1
    waiting = {*sends, *recvs}
    for rank, ends in posts.items():
        assert all(channel.source == rank for channel in ends["sends"])
        assert all(channel.target == rank for channel in ends["recvs"])
        sends.update(ends["sends"])
        recvs.update(ends["recvs"])
    assert sends == recvs == Counter(waiting)


def stands(game: Game, begun: set[OpPlace], living: set[int]) -> dict[int, Stand]:
    """What the ranks that live say of themselves."""
    return {
        rank: Stand(
            game.positions[rank],
            tuple(OpPlace(rank, lane, at) in begun for lane, at in enumerate(game.positions[rank])),
            game.positions[rank],
        )
        for rank in living
    }


@given(
    st.sampled_from(("pipelined", "lockstep")),
    st.sampled_from(("pairwise", "ring")),
    st.integers(2, 3),
    st.integers(1, 60),
    SEEDS,
)
def test_lanes_of_living_ranks_are_drained(
    decoders: dict[str, Decoder], schedule: str, strategy: str, world_size: int, ops: int, seed: int
) -> None:
    """One rank stops for ever after so many ops of all; the others get as far as they can, and are freed of each
    other."""
    lost = seed % world_size
    config = {"schedule": schedule, "sync_strategy": strategy, "world_size": world_size, "chunk_size": 4}
    gate = SeededGate(seed)
    twin = Twin(decoders["small"], Config.of(config), gate=gate)
    fleet = twin.prepare(IDS)
    left = [ops]

    def lose(*_: object) -> None:
        with gate.change():
            left[0] -= 1
            if left[0] == 0:
                twin.engines[lost].executor.freeze()

    for engine in twin.engines:
        engine.executor.on_op = lose
    try:
        twin.go(fleet)
        assert gate.wait(lambda: gate.stuck() or None, WAIT_S)
        living = [engine for engine in twin.engines if engine.rank != lost]
        for engine in living:
            engine.executor.freeze()
            engine.executor.set_limits(engine.executor.stand().positions)
        found = {engine.rank: engine.executor.stand() for engine in living}
        for rank, channels in counterparts(fleet.plan, found).items():
            drain(twin.exchange.comm(rank), channels["sends"], channels["recvs"])

        def only_the_lost_is_waited_for() -> bool:
            return all(
                op.peer == lost for engine in living for op in begun_ops(fleet.plan, engine.rank, twin)
            )

        assert gate.wait(lambda: only_the_lost_is_waited_for() or None, WAIT_S)
    finally:
        assert twin.close()


def begun_ops(plan: Plan, rank: int, twin: Twin) -> list[Op]:
    stand = twin.engines[rank].executor.stand()
    lanes = zip(plan.lanes[rank], stand.positions, stand.started, strict=True)
    return [lane.ops[at] for lane, at, started in lanes if started]


class NotAnswering(BareRanks):
    """Three ranks, of which one answers no more from one command on; it has died or is stuck."""

    def __init__(self, rank: int, since: type[Command[Any]], *, died: bool) -> None:
        super().__init__(3)
        self._rank, self._since, self._died = rank, since, died
        self.asked, self.ended = list[type[Command[Any]]](), list[str]()

    def _send(self, rank: int, command: Command[Any], number: int) -> None:
        stand = Stand((0,), (False,), (0,))
        given: dict[type[Command[Any]], Answer] = {
            LimitDecode: BegunTokens(0),
            Freeze: stand,
            LeaveGroup: LeftGroup(True),
        }
        given |= {OpenStore: StoreAddress("", 0), JoinGroup: Ok()}
        self.asked.append(type(command))
        if rank != self._rank or self._since not in self.asked or "revived" in self.ended:
            self.take(rank, Reply(number, given[type(command)]))

    def exits(self) -> list[int | None]:
        """The session's first look comes too early."""
        has_died = self._died and bool(self.asked)
        return [LOST if has_died and rank == self._rank else None for rank in range(3)]

    def meeting(self) -> StoreAddress:
        return StoreAddress("", 0)

    def kill(self, rank: int) -> None:
        assert rank == self._rank
        self.ended.append("killed")

    def revive(self, rank: int) -> None:
        assert rank == self._rank
        self.ended.append("revived")


@pytest.mark.parametrize("since", [LimitDecode, LeaveGroup])
@pytest.mark.parametrize("died", [True, False])
def test_who_has_died_meanwhile_is_not_called_stuck(
    monkeypatch: pytest.MonkeyPatch, since: type[Command[Any]], died: bool
) -> None:
    monkeypatch.setattr(recovery, "FREEZE_S", 0.05)
    monkeypatch.setattr(recovery, "LEAVE_S", 0.05)
    ranks, said = NotAnswering(1, since, died=died), list[str]()
    assert recover(ranks, None, "gloo", said.append) == [1]
    assert said == ["rank 1 is started again" if died else "rank 1 was stuck and is started again"]
    assert ranks.ended == ["killed", "revived"]


class InCells(NotAnswering):
    """Ranks that answer and whose cells end once they are interrupted, or never."""

    def __init__(self, busy: set[int], deaf: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        super().__init__(-1, LimitDecode, died=False)
        self._busy, self._deaf = set(busy), deaf

    def in_cells(self, among: Sequence[int], patience: float) -> list[int]:
        assert patience > 0
        return sorted(self._busy & {*among})

    def interrupt(self, rank: int) -> None:
        self.ended.append(f"interrupted {rank}")
        self._busy -= {rank} - self._deaf

    def kill(self, rank: int) -> None:
        self.ended.append(f"killed {rank}")

    def revive(self, rank: int) -> None:
        self.ended.append(f"revived {rank}")


def test_of_ranks_that_all_are_stuck_one_lives() -> None:
    ranks, said = InCells(set()), list[str]()
    assert recover(ranks, None, "gloo", said.append, (0, 1, 2)) == [1, 2]
    assert ranks.ended == ["killed 1", "killed 2", "revived 1", "revived 2"]


def test_a_cell_that_does_not_end_is_interrupted_and_else_its_rank_is_started_again() -> None:
    ranks, said = InCells({0, 2}, deaf={2}), list[str]()
    assert recover(ranks, None, "gloo", said.append, (1,)) == [1, 2]
    assert ranks.ended == ["killed 1", "interrupted 0", "interrupted 2", "killed 2", "revived 1", "revived 2"]
    assert said[:2] == ["rank 0's cell is interrupted", "rank 2's cell is interrupted"]


def test_of_ranks_whose_cells_all_hang_one_lives() -> None:
    """Which is not known before: nobody has watched."""
    ranks, said = WaitingForOthers(), list[str]()
    assert recover(ranks, None, "gloo", said.append) == [1, 2]
    assert ranks.ended[-4:] == ["killed 1", "killed 2", "revived 1", "revived 2"]


class WaitingForOthers(InCells):
    """Cells in C code, which hears of no interrupt; they end once another rank has ended."""

    def __init__(self) -> None:
        super().__init__({0, 1, 2}, deaf={0, 1, 2})

    def kill(self, rank: int) -> None:
        super().kill(rank)
        self._busy.clear()


def test_cells_are_left_alone_where_nothing_may_be_killed() -> None:
    ranks = InCells({0})
    assert recover(ranks, None, "gloo", list[str]().append, kill=False) == []
    assert ranks.ended == []


@pytest.mark.parametrize("moment", ["running", "paused", "done"])
def test_a_session_of_threads_recovers_too(moment: str, capsys: pytest.CaptureFixture[str]) -> None:
    with connect("threads", n=2) as session:
        session.load("demo", threads=1)
        run = session.prefill(list(range(1, 12)), chunk_size=4, paused=True)
        run.decode(2)
        wanted = run.tokens, run.sha256()
        run.restart()
        if moment == "paused":
            run.step("layer", 2)
        elif moment == "running":
            run.resume()
        else:
            run.decode(1)
        said = session.recover()
        assert repr(said) == said
        run.restart()
        run.decode(2)
        assert (run.tokens, run.sha256()) == wanted
    assert "2 ranks as threads" in capsys.readouterr().out

"""Ranks that misbehave on a session's word: each act does at its op what it says, and nothing once it is disarmed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from dinfer.engine.ops import HANDLERS, Outcome
from dinfer.messages import Behave, Misbehave, Ok, RankReport, Refused, Reply
from dinfer.model.decoder import Decoder
from dinfer.plan.graph import Channel, channel_of
from dinfer.plan.ops import Op, parse_op
from dinfer.rank import faults
from dinfer.rank.commands import answer, table_of
from dinfer.run.failure import RankFailed
from tests.support.seeded_gate import SeededGate
from tests.support.twin import LocalFleet, Twin, prompt, twin

IDS = list(prompt(10))
SEND = "send kv c1 l0 -> 1, 4 tokens"
NEXT_SEND = "send kv c1 l1 -> 1, 4 tokens"
RECV = "recv kv c1 l0 <- 0, 4 tokens"


@pytest.fixture(autouse=True)
def whole() -> Iterator[None]:
    before = dict(HANDLERS)
    yield
    faults.disarm()
    assert before == HANDLERS


@contextmanager
def begun(
    small: Decoder, rank: int, order: Misbehave, *, ranks: int = 2, strategy: str = "pairwise"
) -> Iterator[tuple[Twin, LocalFleet, list[Op]]]:
    """A run on which `rank` has that order, let go; and what has struck."""
    struck: list[Op] = []
    gate = SeededGate(0)
    with twin(small, world_size=ranks, chunk_size=4, gate=gate, sync_strategy=strategy) as made:
        fleet = made.prepare(IDS)
        faults.arm(rank, order, struck.append)
        made.go(fleet)
        yield made, fleet, struck


def outcome(made: Twin, fleet: LocalFleet) -> str:
    """ "done", "stuck", or how a rank has failed."""
    gate = made.gate
    assert isinstance(gate, SeededGate)
    try:
        fleet.wait(lambda _: gate.stuck(), 30)
    except RankFailed as failed:
        return str(failed)
    return "done" if all(engine.executor.is_done() for engine in made.engines) else "stuck"


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (Misbehave(act="skip", ops=(SEND,)), f"at `{RECV}` the plan expects block c1 l0, 4 tokens"),
        (Misbehave(act="longer", ops=(SEND,)), "rank 0 sent block c1 l0, 5 tokens"),
        (Misbehave(act="twice", ops=(SEND,)), "rank 0 sent block c1 l0, 4 tokens"),
        (Misbehave(act="reorder", ops=(SEND, NEXT_SEND)), "rank 0 sent block c1 l1, 4 tokens"),
        (Misbehave(act="another plan", ops=(SEND,)), "rank 0 runs another plan"),
        (Misbehave(act="raise", ops=("layer c1 l0",)), "Mischief: made by the lab at `layer c1 l0`"),
    ],
)
def test_what_a_rank_does_wrong_at_one_op(small: Decoder, order: Misbehave, said: str) -> None:
    with begun(small, 0, order) as (made, fleet, struck):
        assert said in outcome(made, fleet)
        assert [str(op) for op in struck] == list(order.ops[:1])


def test_a_recv_that_is_left_out_and_a_message_to_another_rank(small: Decoder) -> None:
    with begun(small, 1, Misbehave(act="skip", ops=(RECV,))) as (made, fleet, _):
        assert "sent block c1 l0" in outcome(made, fleet)
    order = Misbehave(act="elsewhere", ops=(SEND,), wire=(2,))
    with begun(small, 0, order, ranks=3) as (made, fleet, _):
        assert "rank 0 sent block c1 l0" in outcome(made, fleet)


def test_two_messages_on_one_channel_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block in pieces is not queued whole: a second message would come between its pieces."""
    second_came, sending, mixed = threading.Event(), list[Channel](), list[bool]()

    class Turn:
        def __init__(self) -> None:
            self._lock = threading.Lock()

        def __enter__(self) -> None:
            if not self._lock.acquire(blocking=False):
                second_came.set()
                assert self._lock.acquire(timeout=60)

        def __exit__(self, *_: object) -> None:
            self._lock.release()

    class Pieces:
        rank = 0

        def send(self, channel: Channel, *_: object) -> int:
            assert channel == Channel("kv", 0, 2)
            sending.append(channel)
            mixed.append(len(sending) > 1)
            if len(mixed) == 2:
                second_came.set()
            assert second_came.wait(60)
            sending.pop()
            return 0

    def send(_: object, op: Op, comm: Any) -> Outcome:
        return Outcome(comm.send(channel_of(0, op), b"", None))

    monkeypatch.setattr(faults, "Lock", Turn, raising=False)
    monkeypatch.setitem(HANDLERS, "send", send)
    astray = SEND.replace("-> 1", "-> 2")
    faults.arm(0, Misbehave(act="elsewhere", ops=(SEND, astray), wire=(2,)), lambda _: None)
    state: Any = SimpleNamespace(rank=0)
    calls = [(HANDLERS["send"], state, parse_op(op), Pieces()) for op in (SEND, astray)]
    threads = [threading.Thread(target=call, args=given) for call, *given in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert mixed == [False, False]


def test_a_command_is_run_before_the_op(small: Decoder, tmp_path: Path) -> None:
    done = tmp_path / "done"
    order = Misbehave(act="command", ops=(SEND,), command=("touch", str(done)))
    with begun(small, 0, order) as (made, fleet, struck):
        assert outcome(made, fleet) == "done"
        assert [str(op) for op in struck] == [SEND]
        assert done.exists()
    with begun(small, 0, replace(order, command=("false",))) as (made, fleet, _):
        assert "CalledProcessError" in outcome(made, fleet)


def test_a_cut_link_carries_nothing_and_says_nothing(small: Decoder) -> None:
    with begun(small, 1, Misbehave(act="cut", ops=(RECV,))) as (made, fleet, struck):
        assert outcome(made, fleet) == "stuck"
        assert [str(op) for op in struck] == [RECV]
        plan, stand = fleet.plan, made.engines[0].executor.stand()
        begun_there = [
            lane.ops[at]
            for lane, at, started in zip(plan.lanes[0], stand.positions, stand.started, strict=True)
            if started
        ]
        assert channel_of(1, parse_op(RECV)) in [channel_of(0, op) for op in begun_there]


@pytest.mark.parametrize(
    "order",
    [
        Misbehave(act="pace", of="layer", seconds=0.02),
        Misbehave(act="pace", of="layer", seconds=0.02, spin=True),
        Misbehave(act="slow wire", of="recv", peer=1, wire=(0.02,)),
    ],
)
def test_what_is_slow_is_only_slow(small: Decoder, order: Misbehave) -> None:
    began = time.monotonic()
    with begun(small, 0, order) as (made, fleet, struck):
        assert outcome(made, fleet) == "done"
        assert len(struck) == 1  # told once, of many
    assert time.monotonic() - began > 0.06


def test_commands_arm_and_disarm_and_refuse_what_there_is_not() -> None:
    reports: list[RankReport] = []
    table = table_of(faults.misbehave_commands(0, reports.append))
    before = dict(HANDLERS)
    assert answer(table, 1, Misbehave(act="skip", ops=(SEND,))) == Reply(1, Ok())
    assert HANDLERS["send"] is not before["send"]
    assert answer(table, 2, Behave()) == Reply(2, Ok())
    assert before == HANDLERS
    refused = answer(table, 3, Misbehave(act="dance", ops=(SEND,)))
    assert isinstance(refused, Refused)
    assert "dance" in refused.error
    assert reports == []

"""Ranks that misbehave on a session's word: each act does at its op what it says, and nothing once it is disarmed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dinfer.engine.ops import HANDLERS
from dinfer.model.decoder import Decoder
from dinfer.plan.graph import channel_of
from dinfer.plan.ops import Op, parse_op
from dinfer.rank import faults
from dinfer.rank.commands import answer
from dinfer.run.fleet import LocalFleet, RankFailed
from tests.support.seeded_gate import SeededGate
from tests.support.twin import Twin, prompt, twin

IDS = list(prompt(10))
SEND = "send kv c1 l0 -> 1, 4 tokens"
RECV = "recv kv c1 l0 <- 0, 4 tokens"


@pytest.fixture(autouse=True)
def whole() -> Iterator[None]:
    before = dict(HANDLERS)
    yield
    faults.disarm()
    assert before == HANDLERS


@contextmanager
def begun(
    small: Decoder, rank: int, order: dict[str, Any], *, ranks: int = 2, strategy: str = "pairwise"
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


def next_send() -> str:
    """The one after SEND on its channel."""
    return "send kv c1 l1 -> 1, 4 tokens"


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ({"act": "skip", "ops": [SEND]}, f"at `{RECV}` the plan expects block c1 l0, 4 tokens"),
        ({"act": "longer", "ops": [SEND]}, "rank 0 sent block c1 l0, 5 tokens"),
        ({"act": "twice", "ops": [SEND]}, "rank 0 sent block c1 l0, 4 tokens"),
        ({"act": "reorder", "ops": [SEND, next_send()]}, "rank 0 sent block c1 l1, 4 tokens"),
        ({"act": "another plan", "ops": [SEND]}, "rank 0 runs another plan"),
        ({"act": "raise", "ops": ["layer c1 l0"]}, "Mischief: made by the lab at `layer c1 l0`"),
    ],
)
def test_what_a_rank_does_wrong_at_one_op(small: Decoder, order: dict[str, Any], said: str) -> None:
    with begun(small, 0, order) as (made, fleet, struck):
        assert said in outcome(made, fleet)
        assert [str(op) for op in struck] == order["ops"][:1]


def test_a_recv_that_is_left_out_and_a_message_to_another_rank(small: Decoder) -> None:
    with begun(small, 1, {"act": "skip", "ops": [RECV]}) as (made, fleet, _):
        assert "sent block c1 l0" in outcome(made, fleet)
    order = {"act": "elsewhere", "ops": [SEND], "with": [2]}
    with begun(small, 0, order, ranks=3) as (made, fleet, _):
        assert "rank 0 sent block c1 l0" in outcome(made, fleet)


def test_a_command_is_run_before_the_op(small: Decoder, tmp_path: Path) -> None:
    done = tmp_path / "done"
    order = {"act": "command", "ops": [SEND], "command": ["touch", str(done)]}
    with begun(small, 0, order) as (made, fleet, struck):
        assert outcome(made, fleet) == "done"
        assert [str(op) for op in struck] == [SEND]
        assert done.exists()
    with begun(small, 0, {**order, "command": ["false"]}) as (made, fleet, _):
        assert "CalledProcessError" in outcome(made, fleet)


def test_a_cut_link_carries_nothing_and_says_nothing(small: Decoder) -> None:
    with begun(small, 1, {"act": "cut", "ops": [RECV]}) as (made, fleet, struck):
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
        {"act": "pace", "of": "layer", "seconds": 0.02},
        {"act": "pace", "of": "layer", "seconds": 0.02, "spin": True},
        {"act": "slow wire", "of": "recv", "peer": 1, "with": [0.02]},
    ],
)
def test_what_is_slow_is_only_slow(small: Decoder, order: dict[str, Any]) -> None:
    began = time.monotonic()
    with begun(small, 0, order) as (made, fleet, struck):
        assert outcome(made, fleet) == "done"
        assert len(struck) == 1  # told once, of many
    assert time.monotonic() - began > 0.06


def test_commands_arm_and_disarm_and_refuse_what_there_is_not() -> None:
    reports: list[dict[str, Any]] = []
    table = faults.misbehave_commands(0, lambda kind, **fields: reports.append({"type": kind, **fields}))
    before = dict(HANDLERS)
    assert answer(table["misbehave"], {"act": "skip", "ops": [SEND]}) == {}
    assert HANDLERS["send"] is not before["send"]
    assert answer(table["behave"], {}) == {}
    assert before == HANDLERS
    assert "error" in answer(table["misbehave"], {"act": "dance", "ops": [SEND]})
    assert reports == []

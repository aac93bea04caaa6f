"""Verdicts from events alone: files written by hand, as other programs might, and the naive game without its plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.plan.plan import Plan
from dinfer.trace.events import Event
from dinfer.trace.read import read_jsonl
from dinfer.verdict.judge import explain
from dinfer.verdict.recorded import explain_events
from dinfer.verdict.signs import Raised, Signs
from tests.support.made_ops import MadeOps
from tests.support.plan_game import Game
from tests.support.plan_strategies import plans
from tests.support.stuck_states import SLEEPS, signs_of

FILES = Path(__file__).parent / "recorded"
SAID = {
    "all-send-first": ("cycle", (0, 1, 2, 3), "rank 3 is in `send -> 0`"),
    "both-ends-there": ("stalled link", (0,), "the link 0→1 does not carry `send kv c0 l3 -> 1`"),
    "different-collectives": (
        "out of order",
        (2,),
        "rank 2 is in another collective: `all_gather` on rank 2 meets `all_reduce` on rank 0",
    ),
    "different-sizes": ("other size", (1,), "4,096 and 1,024 bytes"),
    "missing-collective": ("stuck", (2,), "rank 2 is in `other`"),
    "recv-against-barrier": ("cycle", (0, 1), "rank 1 is in `recv <- 0`; ranks 2 and 3 wait for them"),
    "send-left-out": ("never sent", (0,), "rank 0 has ended 2 such sends"),
    "through": ("done", (), "the run is done"),
}


def events_of(name: str) -> tuple[Event, ...]:
    return read_jsonl(FILES / f"{name}.jsonl").events


@pytest.mark.parametrize("name", [path.stem for path in sorted(FILES.glob("*.jsonl"))])
def test_a_recorded_hang(name: str) -> None:
    verdict = explain_events(events_of(name))
    kind, ranks, words = SAID[name]
    assert (verdict.kind, verdict.ranks) == (kind, ranks), verdict
    assert words in verdict.sentence


def test_what_is_known_beside_the_events_comes_first() -> None:
    events = events_of("missing-collective")
    ways = {
        "exception": Signs(raised=Raised("ValueError: x")),
        "dead": Signs(ended="was killed by SIGKILL"),
        "stopped": Signs(process="T"),
        "stuck in Python": Signs(frames={"main": SLEEPS}),
        "computing": Signs(cpu_moves=True),
        "lost peer": Signs(raised=Raised("closed", secondary=True)),
    }
    for kind, signs in ways.items():
        verdict = explain_events(events, {2: signs})
        assert (verdict.kind, verdict.rank, verdict.blocked) == (kind, 2, (0, 1, 3)), verdict


def test_what_began_just_now_is_on_its_way() -> None:
    for name in SAID.keys() - {"through", "all-send-first", "recv-against-barrier"}:
        assert explain_events(events_of(name), now=25_000_000).kind == "moving"
        assert explain_events(events_of(name), now=6_000_000_000).is_hung


def test_a_rank_that_has_left_is_waited_for() -> None:
    """It has nothing open."""
    events = [event for event in events_of("missing-collective") if event.rank != 2 or event.end]
    verdict = explain_events(events)
    assert (verdict.kind, verdict.rank) == ("stuck", 2)
    assert verdict.sentence.startswith("rank 2 began nothing after `other`")


def as_events(game: Game) -> list[Event]:
    """What a recorder would hold: each op that has ended, and the one that has begun, by lane."""
    found = []
    for (rank, number), at in game.at.items():
        lane = game.plan.lanes[rank][number]
        for index, op in enumerate(lane.ops[: at + game.is_ready((rank, number))]):
            peer = op.peer if op.is_transfer else None
            ended = 2 if index < at else 0
            found.append(
                Event(rank, lane.name, op.kind, 1, 1, 1, ended, op.what, op.chunk, op.layer, peer, op.tokens)
            )
    return found


def test_an_op_before_a_later_one_of_its_thread_is_no_place() -> None:
    """C++ code has waited for it where nobody sees, and the record of its end is missing."""
    ops = MadeOps(2)
    ops.all("all_reduce", 0, 1, open=True)
    ops.recv(0, 1, open=True)
    ops.recv(1, 0, open=True)
    verdict = explain_events(ops.events, {}, groups=ops.groups)
    assert verdict.kind == "cycle"
    assert "all_reduce" not in str(verdict)


def test_where_a_stopped_rank_was() -> None:
    ops = MadeOps(2)
    ops.message(0, 1)
    ops.recv(0, 1, open=True)
    signs = {1: Signs(process="T", answers=False)}
    verdict = explain_events(ops.events, signs, groups=ops.groups)
    assert (verdict.kind, verdict.ranks) == ("stopped", (1,))
    assert "after `recv <- 0` ([4] float32) at rank1.py:1" in verdict.sentence


def test_who_has_ended_is_in_no_op() -> None:
    ops = MadeOps(2)
    ops.all("all_reduce", 0, 1, open=True)
    ended = {rank: Signs(phase="done") for rank in (0, 1)}
    assert not explain_events(ops.events, ended, groups=ops.groups).is_hung


@given(plan=plans(schedules=("batched",)), seed=st.integers(0, 99))
def test_without_the_plan_a_circle_is_the_same(plan: Plan, seed: int) -> None:
    game = Game(plan, rendezvous=True, seed=seed)
    game.play()
    known, alone = explain(plan, signs_of(game)), explain_events(as_events(game))
    assert (known.kind, known.ranks) == (alone.kind, alone.ranks)
    assert set(known.blocked) >= set(alone.blocked)

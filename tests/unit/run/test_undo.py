"""Undoing what was done last, whatever it was: the run stands as before it, and is told what that took."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import pytest

from dinfer.cluster.threads import LocalRanks
from dinfer.errors import NotPossible
from dinfer.history import MOST
from dinfer.results import Moved
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.verdict.where import rank_spans_text
from tests.support.facts import has_facts
from tests.support.threads import engines
from tests.support.twin import prompt

MODEL = {"layers": 6}
IDS = tuple(prompt(22))
DEADLINE_S = 120.0
SLOW = 0.01


class Place(NamedTuple):
    """What undo restores."""

    cut: tuple[tuple[int, ...], ...]
    tokens: list[int]
    breakpoints: list[str]
    faults: list[int]


def place(run: Run) -> Place:
    stands = run.standing().stands
    cut = tuple(tuple(stand.positions) for stand in stands)
    return Place(cut, run.tokens, list(map(str, run.breakpoints)), [one.number for one in run.faults])


@pytest.fixture
def run(session: Session) -> Run:
    return session.prefill(IDS, chunk_size=8, max_new_tokens=8, paused=True)


def check_undo(run: Run, before: Place, *facts: str) -> None:
    """The last action is undone, and the answer has these facts in its one line."""
    said = run.undo()
    assert place(run) == before, said
    assert has_facts(said, " … ".join(facts)), said
    assert "\n" not in said
    assert run.last_call == "run.undo()"


# -- going back by a unit


@pytest.mark.parametrize("unit", ["chunk", "wave", "layer"])
def test_going_back_by_a_layer_undoes_one_block_whatever_was_stepped(run: Run, unit: str) -> None:
    run.step("chunk")
    run.step(unit)
    for _ in range(3):
        moved = run.step_back("layer")
        assert isinstance(moved, Moved)
        assert str(moved).startswith("undid c")
        assert len(moved.lines) == 1
        lanes = [
            lane
            for rank, all_lanes in enumerate(run.plan.lanes)
            for lane in zip(all_lanes, moved.before[rank], moved.after[rank], strict=True)
        ]
        layers = {(op.chunk, op.layer) for lane, b, a in lanes for op in lane.ops[a:b] if op.kind == "layer"}
        assert len(layers) == 1


def test_it_is_told_in_one_line_what_was_undone(run: Run) -> None:
    run.step("chunk")
    assert str(run.step_back("layer")) == "undid c0 l5 on ranks 0–2"
    assert str(run.step_back("layer", 4)) == "undid c0 l1 … c0 l4 (4) on ranks 0–2"
    run.decode(2)
    assert str(run.step_back("token")) == "undid 1 new token; 1 is left"
    assert str(run.step_back("layer")) == "undid c2 l5 on ranks 0–2, and 1 new token"
    assert str(run.step_back("token")) == "nothing to do: there are no new tokens"


def test_transfers_alone_are_told_by_their_link(run: Run) -> None:
    said = list[str]()
    run.step("chunk")
    while any(map(any, place(run).cut)):
        said.append(str(run.step_back("op")))
    assert "undid block c0 l0 0→1" in said
    assert "undid hidden c0 l2 0→1" in said
    assert "undid c0 l3 on rank 1" in said
    assert said[-1] == "undid embed c0 on rank 0"


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([1], "rank 1"), ([2, 0, 1], "ranks 0–2"), ([0, 2], "ranks 0, 2"), ([0, 1, 3], "ranks 0–1, 3")],
)
def test_ranks_in_a_row_are_told_in_short(ranks: list[int], text: str) -> None:
    assert rank_spans_text(ranks) == text


# -- moves


@pytest.mark.parametrize(
    ("name", "arguments", "fact"),
    [
        ("step", ("chunk",), "took back "),
        ("step", ("layer", 5), "took back "),
        ("step_back", ("chunk",), "did "),
        ("step_back", ("layer", 3), "did "),
        ("run_to", (2, 4), "took back "),
        ("run_to", (0, 1), "did "),
        ("resume_back", (), "did "),
        ("decode", (3,), "took back … took back 3 new tokens"),
    ],
)
def test_a_move_is_undone(run: Run, name: str, arguments: tuple[Any, ...], fact: str) -> None:
    run.step("wave", 4)
    run.step("op", 3)
    before = place(run)
    getattr(run, name)(*arguments)
    assert place(run) != before
    check_undo(run, before, f"undid run.{name}(", fact)


def test_undoing_twice_goes_further_back_and_then_there_is_nothing_left(run: Run) -> None:
    places = [place(run)]
    for unit in ("chunk", "wave", "op"):
        run.step(unit)
        places.append(place(run))
    for call, before in zip(("op", "wave", "chunk"), places[-2::-1], strict=True):
        check_undo(run, before, f'undid run.step("{call}"): took back')
    assert run.undo() == "nothing to undo: there is no earlier action"


def test_what_does_nothing_is_not_undone(run: Run) -> None:
    run.step_back("layer")
    run.pause()
    run.breakpoints.clear()
    run.restart()
    assert "nothing to undo" in run.undo()
    run.step("chunk")
    before = place(run)
    run.decode(1)
    end = place(run)
    run.step("layer")
    run.resume()
    assert place(run) == end
    check_undo(run, before, "undid run.decode(1)")


def test_a_run_that_was_let_go_comes_back_to_where_it_was_resumed(run: Run) -> None:
    run.step("layer", 2)
    before = place(run)
    run.resume()
    check_undo(run, before, "undid run.resume()")
    run.resume()
    run.wait(DEADLINE_S)
    check_undo(run, before, "undid run.resume()", "took back c")


def test_a_play_is_undone_as_one_action_also_while_it_goes_on(run: Run) -> None:
    run.step("layer", 2)
    before = place(run)
    run.play("layer", 100.0)
    run.wait(DEADLINE_S)
    check_undo(run, before, 'undid run.play("layer", 100.0)')
    run.play("wave", SLOW)
    check_undo(run, before, 'undid run.play("wave", 0.01)')
    assert run.standing().playing == ""


def test_a_step_that_was_paused_half_way_is_undone(run: Run) -> None:
    before = place(run)
    run.break_at(when="slower than 0 ms")
    assert run.step("chunk", 3).stopped
    said = run.undo()
    assert 'undid run.step("chunk", 3)' in said
    assert place(run).cut == before.cut


def test_going_back_from_new_tokens_is_undone_with_the_same_tokens(run: Run) -> None:
    run.decode(5)
    before = place(run)
    run.step_back("token", 2)
    check_undo(run, before, 'undid run.step_back("token", 2): made 2 new tokens again')
    run.step_back("chunk")
    assert run.tokens == []
    check_undo(run, before, 'undid run.step_back("chunk"): did c2 l0', "made 5 new tokens again")


def test_more_tokens_are_taken_back_to_those_before(run: Run) -> None:
    run.decode(2)
    before = place(run)
    run.decode(3)
    check_undo(run, before, "undid run.decode(3): took back 3 new tokens")
    run.step("token", 2)
    check_undo(run, before, 'undid run.step("token", 2): took back 2 new tokens')


def test_a_restart_is_undone(run: Run) -> None:
    run.decode(3)
    before = place(run)
    run.restart()
    assert place(run).tokens == []
    check_undo(run, before, "undid run.restart(): did c0 l0", "made 3 new tokens again")


def test_a_restart_after_a_failure_is_not_and_that_is_said(run: Run) -> None:
    run.step("chunk")
    run.recovering(ended=True)  # what session.recover() tells it
    run.restart()
    assert has_facts(run.undo(), "nothing to undo … failed … run.restart()")
    run.step("layer")
    assert 'undid run.step("layer")' in run.undo()


def test_a_pause_stops_it_and_the_next_undo_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.decode(5)
    before = place(run)
    run.step_back("chunk")
    go = run._generation.go

    def paused(*given: Any) -> Any:
        pauser = threading.Thread(target=run.pause)
        pauser.start()
        pauser.join(DEADLINE_S)
        return go(*given)

    monkeypatch.setattr(run._generation, "go", paused)
    with pytest.raises(NotPossible, match="paused half-way"):
        run.undo()
    assert run.tokens == []
    monkeypatch.undo()
    check_undo(run, before, 'undid run.step_back("chunk")', "made 5 new tokens again")


def test_an_edit_by_hand_stays_and_that_is_said(session: Session, run: Run) -> None:
    run.step("chunk", 2)
    engine: Any = engines(session)[0]
    engine.kv(layer=0).k[0, 1] += 3
    run.step("layer")
    said = run.undo()
    assert has_facts(
        said, 'undid run.step("layer") … took back … edited by hand is not undone: KV of layer 0'
    )


# -- breakpoints and faults


def test_breakpoints_come_and_go_again(run: Run) -> None:
    run.step("chunk")
    empty = place(run)
    run.break_at(layer=2)
    run.break_at(layer=3, when="nan")
    both = place(run)
    run.breakpoints.remove(1)
    one = place(run)
    run.breakpoints.clear()
    check_undo(run, one, "undid run.breakpoints.clear(): set #2: after layer 3")
    check_undo(run, both, "undid run.breakpoints.remove(1): set #1: after layer 2")
    assert "undid run.break_at(layer=3, when='nan'): removed #2" in run.undo()
    check_undo(run, empty, "undid run.break_at(layer=2): removed #1")
    run.resume()
    assert run.wait(DEADLINE_S).state == "done"


def test_conditions_that_come_back_are_looked_for_again(run: Run) -> None:
    run.break_at(when="slower than 0 ms")
    run.breakpoints.clear()
    run.undo()
    run.resume()
    assert "stopped at #1" in str(run.wait(DEADLINE_S))
    assert run.standing().state == "paused"


def test_faults_come_and_go_again(session: Session, run: Run) -> None:
    before = place(run)
    run.inject("lost", layer=1, chunk=1)
    armed = place(run)
    run.faults.clear()
    check_undo(run, armed, "undid run.faults.clear(): armed #1 lost")
    check_undo(run, before, "undid run.inject('lost'", "disarmed #1")
    assert isinstance(session.ranks, LocalRanks)
    run.resume()
    run.wait(DEADLINE_S)
    assert run.kv().diff().equal


def test_bytes_that_a_fault_has_changed_stay_and_that_is_said(run: Run) -> None:
    run.step("chunk", 2)
    run.inject("zero", layer=0, chunk=0, rank=2)
    assert has_facts(run.undo(), "disarmed #1 … what #1 changed stays changed until run.restart()")
    assert not run.kv().diff().equal


def test_only_so_many_actions_are_kept(run: Run) -> None:
    for _ in range(MOST + 1):
        run.break_at(layer=1)
    for _ in range(MOST):
        assert "removed" in run.undo()
    assert f"only the last {MOST} actions are kept" in run.undo()
    assert len(run.breakpoints) == 1


def test_what_a_fault_changed_is_not_told_to_stay_once_the_run_is_back_before_it(run: Run) -> None:
    start = place(run)
    run.inject("swap_kv", layer=1, chunk=0, where="wire", rank=2)
    armed = place(run)
    run.step("chunk")
    assert run.faults[1].has_struck
    check_undo(run, armed, 'undid run.step("chunk")')
    said = run.undo()
    assert has_facts(said, "undid run.inject('swap_kv' … disarmed #1")
    assert "stays changed" not in said
    assert place(run) == start
    run.inject("lost", layer=1, chunk=0, where="memory", rank=2)
    run.step("chunk")
    run.step_back("chunk")
    run.faults.clear()
    assert "stays changed" not in str(run.where())


def test_a_plan_that_was_refuted_has_nothing_to_go_back_to(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=8, schedule="batched", unsafe=True, paused=True)
    assert "refuted" in run.undo()

"""Playing at a pace, what is known of single blocks, and a run as the last line of a cell."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import dinfer
from dinfer.engine.prefill import Prefill
from dinfer.plan.cut import Cuts
from dinfer.plan.ops import PlanError
from dinfer.run import events
from dinfer.run.failure import RankFailed
from dinfer.run.run import Run
from dinfer.run.state import STANDING, Standing
from dinfer.run.stepper import NoProgress
from dinfer.session.session import Session
from dinfer.trace.events import Event
from tests.support.runs import wait_for
from tests.support.threads import stands_at_a_cut

PROMPT = list(range(1, 31))
FAST, SLOW = 100.0, 0.01
DEADLINE_S = 120.0


MODEL = "demo"


@pytest.fixture
def run(session: Session) -> Run:
    return session.prefill(PROMPT, chunk_size=10, paused=True)


def marks(run: Run) -> list[tuple[int, int, int, str]]:
    return [(mark.rank, mark.chunk, mark.layer, mark.kind) for mark in run.standing().marks]


def cut_of(run: Run) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(stand.positions) for stand in run.standing().stands)


def stepping(run: Run) -> None:
    """Play so slowly that the run stands after the first step, and wait until it does."""
    run.play("layer", SLOW)
    wait_for(
        lambda: any(map(any, cut_of(run))) and run.standing().state == "paused", "the first step is done"
    )


def test_it_steps_to_the_end_and_returns_at_once(run: Run) -> None:
    assert run.play("wave", SLOW) is None
    assert run.standing().playing == 'run.play("wave", per_second=0.01)'
    assert run.where().state == "running"
    run.play("wave", FAST)
    assert run.wait(DEADLINE_S).state == "done"
    assert run.standing().playing == ""
    run.play("wave", FAST)
    assert run.standing().playing == ""
    assert "nothing to do: the run stands at the end of prefill" in str(run.where())


def test_it_stops_at_a_breakpoint_though_a_step_would_go_past_it_and_goes_on_from_there(run: Run) -> None:
    run.break_at(layer=2, chunk=1)
    run.play("chunk", FAST)
    assert "stopped at #1" in str(run.wait(DEADLINE_S))
    assert cut_of(run) == Cuts(run.plan).after_block(1, 2)
    run.play("chunk", FAST)
    assert run.wait(DEADLINE_S).state == "done"


def test_a_run_comes_to_its_stand_and_the_reason_in_one_step(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sees it stand sees why, though the session's thread has not looked yet."""
    monkeypatch.setattr(Run, "look", lambda _: None)
    run.break_at(layer=1, chunk=1)
    there, seen = Cuts(run.plan).after_block(1, 1), list[Standing]()

    def stands() -> bool:
        now = run.standing()
        if now.state in STANDING and tuple(tuple(stand.positions) for stand in now.stands) == there:
            seen.append(now)
        return bool(seen)

    run.resume()
    wait_for(stands, "the run stands at the breakpoint")
    assert seen[0].message == "stopped at #1: after layer 1, chunk 1"
    assert (run.met, run.breakpoints.hits(1)) == ((1,), 1)
    run.standing()
    assert run.breakpoints.hits(1) == 1  # it is told once


def test_pause_ends_it_and_new_breakpoints_reach_it_between_two_steps(run: Run) -> None:
    stepping(run)
    assert run.break_at(layer=5, chunk=2).number == 1
    assert run.standing().playing
    assert run.pause().state == "paused"
    assert run.standing().playing == ""
    assert stands_at_a_cut(run)


def test_pause_stops_the_step_that_it_is_in(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, leave = threading.Event(), threading.Event()
    layer = Prefill.layer

    def held(self: Prefill, *given: Any) -> Any:
        inside.set()
        assert leave.wait(DEADLINE_S)
        return layer(self, *given)

    monkeypatch.setattr(Prefill, "layer", held)
    run.play("chunk", SLOW)
    assert inside.wait(DEADLINE_S)
    pauser = threading.Thread(target=run.pause)
    pauser.start()
    wait_for(lambda: run.standing().playing == "", "the pause is heard")
    leave.set()
    pauser.join(DEADLINE_S)
    assert not pauser.is_alive()
    assert 0 < sum(map(sum, cut_of(run))) < sum(map(sum, Cuts(run.plan).next(Cuts(run.plan).start, "chunk")))


@pytest.mark.parametrize(
    "name", ["step", "step_back", "run_to", "resume", "decode", "undo", "restart", "close"]
)
def test_whatever_else_moves_the_run_ends_it_first(run: Run, name: str) -> None:
    stepping(run)
    arguments = {"run_to": (0, 3), "decode": (1,), "close": ("the test is over",)}.get(name, ())
    getattr(run, name)(*arguments)
    assert run.standing().playing == ""
    if name != "close":
        run.wait(DEADLINE_S)
        assert run.standing().state in ("paused", "done")


def test_a_report_waits_for_its_end(run: Run, tmp_path: Path) -> None:
    run.play("wave", FAST)
    saved = run.save(tmp_path / "saved")
    assert (run.standing().playing, run.standing().state) == ("", "done")
    assert dinfer.open(saved)


def test_a_rank_that_fails_meanwhile_is_known_to_who_waits_and_looks(
    session: Session, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError("broken on purpose")

    monkeypatch.setattr(Prefill, "layer", fail)
    run.play("layer", FAST)
    with pytest.raises(RankFailed, match="broken on purpose"):
        run.wait(DEADLINE_S)
    wait_for(lambda: run.standing().playing == "", "the play has ended, too")
    assert "broken on purpose" in str(run.where())
    monkeypatch.undo()
    session.recover()
    run.restart()
    run.play("wave", FAST)
    assert run.wait(DEADLINE_S).state == "done"


def test_a_step_that_does_not_arrive_ends_it_and_is_known(
    session: Session, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object) -> bool:
        raise NoProgress("the ranks have not arrived")

    monkeypatch.setattr(run._moves, "play_on", late)
    run.play("layer", FAST)
    with pytest.raises(NoProgress, match="have not arrived"):
        run.wait(DEADLINE_S)
    wait_for(lambda: any("have not arrived" in line for line in session.log), "it is logged")
    assert 'run.play("layer", per_second=100) ended: the ranks have not arrived' in str(run.where())
    run.pause()
    assert run.wait(DEADLINE_S).state == "paused"


def test_an_interrupt_of_who_waits_for_it_ends_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> bool:
        raise KeyboardInterrupt

    stepping(run)
    monkeypatch.setattr(run._player, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.wait()
    assert run.standing().playing == ""
    assert "interrupted: the run is paused" in str(run.where())


@pytest.mark.parametrize("pace", [0, -1, 101, float("nan")])
def test_a_pace_that_is_none_is_refused(run: Run, pace: float) -> None:
    with pytest.raises(PlanError, match="per_second is"):
        run.play("layer", pace)


def test_a_block_is_marked_armed_then_differing_until_the_run_goes_back_before_it(run: Run) -> None:
    run.inject("bitflip", rank=2, layer=3, chunk=0)
    assert marks(run) == [(2, 0, 3, "armed")]
    run.run_to(chunk=1, layer=5)
    assert not run.kv().diff().equal
    assert marks(run) == [(2, 0, 3, "armed"), (2, 0, 3, "differs")]
    assert "rank 2 differs at layer 3" in run.standing().marks[-1].text
    run.faults.clear()
    run.step_back("layer")
    assert marks(run) == [(2, 0, 3, "differs")]
    run.run_to(chunk=0, layer=2)
    assert marks(run) == []


def test_what_is_compared_anew_is_known_anew_and_the_rest_stays(run: Run) -> None:
    run.run_to(chunk=1, layer=5)
    for layer in (1, 4):
        run.inject("zero", rank=0 if layer == 4 else 1, layer=layer, chunk=1, where="memory")
    run.kv().diff()
    run.faults.clear()
    assert sorted(marks(run)) == [(0, 1, 4, "differs"), (1, 1, 1, "differs")]
    run.step_back("chunk", 2)
    assert marks(run) == []
    run.run_to(chunk=1, layer=5)
    run.inject("zero", rank=0, layer=4, chunk=1, where="memory")
    run.kv(layer=4).diff()
    run.kv(layer=1).diff()
    assert (0, 1, 4, "differs") in marks(run)


def test_corrupt_blocks_are_marked(session: Session) -> None:
    run = session.prefill(PROMPT, chunk_size=10, paused=True)
    run.inject("bitflip", rank=2, layer=0, chunk=0, where="wire")
    run.run_to(chunk=0, layer=1)
    wait_for(lambda: any(kind == "corrupt" for *_, kind in marks(run)), "it is marked")
    assert (2, 0, 0, "corrupt") in marks(run)
    run.restart()
    assert [kind for *_, kind in marks(run)] == ["armed"]


def test_events_come_once_and_all_of_them_after_a_restart(run: Run) -> None:
    found, read = list[Event](), list[int]()
    for _ in range(4):
        run.step("wave")
        assert run.trace.events  # waits for those of the step
        new, read = run.events_since(read)
        found += new
    assert len(found) == len(set(found)) == len(run.trace.events)
    assert set(found) == set(run.trace.events)
    assert run.events_since(read) == ([], read)
    run.restart()
    run.run_to(chunk=2, layer=5)  # as many as before, and more
    assert run.trace.events
    new, after = run.events_since(read)
    assert len(new) == len(run.trace.events)
    assert after[0] != read[0]


def test_the_trace_of_a_run_that_stands_has_what_was_done_last(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it came there: none waits for events that will not come, either."""
    monkeypatch.setattr(events, "LATE_S", 1000.0)
    ops = sum(len(lane.ops) for lanes in run.plan.lanes for lane in lanes)
    for _ in range(5):
        run.restart()
        run.resume()
        run.wait(60)
        assert len(run.trace.events) == ops
    run.step_back("chunk")
    assert len(run.trace.events) == ops
    run.step("layer")
    run.step_back("layer", 4)
    run.run_to(chunk=1, layer=4)
    again = len(run.trace.events) - ops
    assert again > 0
    run.resume()
    run.wait(60)
    assert len(run.trace.events) - ops > again
    newest = {(event.rank, event.lane): event.index for event in run.trace.events}
    for rank, lanes in enumerate(run.plan.lanes):
        assert all(newest[rank, lane.name] == len(lane.ops) - 1 for lane in lanes if lane.ops)


class Kernel:
    """A shell that has one."""

    kernel = object()


def test_a_run_is_its_panel_in_a_notebook_and_its_text_elsewhere(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import IPython

    class Shown:
        def _repr_mimebundle_(self) -> tuple[dict[str, Any], dict[str, Any]]:
            return {"text/html": "a panel", "text/plain": "Panel(…)"}, {}

    assert run._repr_mimebundle_() == {}
    run.show = lambda _: Shown()
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    assert run._repr_mimebundle_() == {}
    monkeypatch.setattr(IPython, "get_ipython", Kernel)
    assert run._repr_mimebundle_() == ({"text/html": "a panel", "text/plain": str(run)}, {})
    run.close("another run has begun")
    assert run._repr_mimebundle_() == {}

"""Playing at a pace, what is known of single blocks, and a run as the last line of a cell."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from dinfer.plan.cut import Cuts
from dinfer.plan.ops import PlanError
from dinfer.run import state
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.trace.events import Event
from tests.support.runs import wait_for
from tests.support.threads import stands_at_a_cut

PROMPT = list(range(1, 31))
FAST = 100.0


MODEL = "demo"


@pytest.fixture
def run(session: Session) -> Run:
    return session.prefill(PROMPT, chunk_size=10, paused=True)


def marks(run: Run) -> list[tuple[int, int, int, str]]:
    return [(mark.rank, mark.chunk, mark.layer, mark.kind) for mark in run.standing().marks]


def test_it_steps_to_the_end(run: Run) -> None:
    moved = run.play("wave", FAST)
    assert run.standing().state == "done"
    assert moved.before == tuple(tuple(0 for _ in lanes) for lanes in run.plan.lanes)
    assert not moved.stopped
    assert not run.play("wave", FAST).moved


def test_it_stops_at_a_breakpoint_though_a_step_would_go_past_it_and_goes_on_from_there(run: Run) -> None:
    run.break_at(layer=2, chunk=1)
    moved = run.play("chunk", FAST)
    assert moved.stopped
    wait_for(lambda: "stopped at #1" in run.standing().message, "the breakpoint is named")
    at = moved.after
    assert at == run.run_to(chunk=1, layer=2).before
    assert Cuts(run.plan).after_block(1, 2) == at
    assert run.play("chunk", FAST).moved
    assert run.standing().state == "done"


def test_pause_and_new_breakpoints_reach_it_between_two_steps(run: Run) -> None:
    player = threading.Thread(target=run.play, args=("op", 5.0))
    player.start()
    wait_for(lambda: any(any(stand.positions) for stand in run.standing().stands), "it steps")
    assert run.break_at(layer=5, chunk=2).number == 1
    run.pause()
    player.join(60)
    assert not player.is_alive()
    assert stands_at_a_cut(run)
    assert run.standing().state == "paused"


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
    monkeypatch.setattr(state, "LATE_S", 1000.0)
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

"""A run that is looked at stands still meanwhile, whoever wants to move it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinfer.cluster.kv import Live
from dinfer.plan.ops import PlanError
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.threads import session_on_threads

LAYERS = 3
DEADLINE_S = 120.0
MEANWHILE_S = 0.5
"""by then a step that may begin has ended"""


MODEL = {"layers": LAYERS}
RANKS = 2


@pytest.fixture
def run(session: Session) -> Run:
    """A run of 40 tokens in 5 chunks that stands in its last one."""
    return in_its_last_chunk(session)


def in_its_last_chunk(session: Session) -> Run:
    run = session.prefill([1 + n for n in range(40)], chunk_size=8, paused=True)
    run.run_to(chunk=4, layer=1)
    return run


def goes_back_within(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> tuple[threading.Thread, list[bool]]:
    """A thread that takes the run back as soon as the ranks are asked for this, and whether that had to wait."""
    waits = list[bool]()
    thread = threading.Thread(target=run.step_back, args=("chunk", 2))
    ask: Callable[..., Any] = getattr(Live, name)

    def asked(self: Live, *given: Any) -> Any:
        found = ask(self, *given)
        if thread.ident is None:
            thread.start()
            thread.join(MEANWHILE_S)
            waits.append(thread.is_alive())
        return found

    monkeypatch.setattr(Live, name, asked)
    return thread, waits


def test_a_diff_is_of_one_moment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [stand.positions for stand in run.standing().stands]
    thread, waits = goes_back_within("held", run, monkeypatch)
    found = run.kv().diff()
    thread.join(DEADLINE_S)
    assert waits == [True]
    assert found.equal, found.verdict
    assert not run.standing().marks
    assert [stand.positions for stand in run.standing().stands] != before, "the step came after the diff"


@pytest.mark.parametrize("name", ["held", "summary"])
def test_a_layer_is_shown_as_of_one_moment(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    thread, waits = goes_back_within(name, run, monkeypatch)
    shown = str(run.kv(layer=0))
    thread.join(DEADLINE_S)
    assert "rank 0 holds 40, rank 1 holds 40" in shown
    assert "K, head 0, token 0" in shown
    assert waits == [True]


def test_nobody_moves_the_run_while_a_hidden_state_is_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread, waits = goes_back_within("hidden_first", run, monkeypatch)
    found = run.hidden(chunk=4, layer=1)
    assert waits == [True]
    thread.join(DEADLINE_S)
    with pytest.raises(PlanError, match="not computed yet"):
        str(found)  # it was not fetched while it was there


def test_a_hidden_state_that_the_run_has_gone_back_before_is_not_there(run: Run) -> None:
    found = run.hidden(chunk=4, layer=1)
    run.run_to(chunk=1, layer=0)
    for look in (lambda: found[0], lambda: str(found)):
        with pytest.raises(PlanError, match="of chunk 4 before layer 1 is not computed yet; the run stands"):
            look()


def test_values_that_the_run_has_gone_back_before_are_not_there(run: Run) -> None:
    keys = run.kv(layer=0).k
    assert keys[0, -1].shape == keys[0, 0].shape
    run.run_to(chunk=1, layer=0)
    with pytest.raises(
        IndexError, match="of layer 0, fewer than when this was made, since the run has gone back"
    ):
        keys[0, -1]
    assert keys[0, 0].numel() > 0


def test_both_runs_stand_while_they_are_compared(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session_on_threads(2, model) as session:
        other = in_its_last_chunk(session)
        thread, waits = goes_back_within("held", other, monkeypatch)
        found = run.kv().diff(other)
        thread.join(DEADLINE_S)
    assert waits == [True]
    assert found.equal, found.verdict


def test_a_run_that_is_sent_on_before_it_is_compared_is_waited_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = list[str]()
    wait, live = run.wait, run._inspector.live

    def wait_and_resume() -> object:
        found = wait()
        run.resume()
        return found

    def noted() -> Any:
        states.append(run.standing().state)
        return live()

    monkeypatch.setattr(run, "wait", wait_and_resume)
    monkeypatch.setattr(run._inspector, "live", noted)
    assert run.compare("reference").equal
    assert states == ["done"]

"""Playing a run on a real cluster: the call returns at once, and a pause stops play, step and decode."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.runs import wait_for
from tests.support.threads import stands_at_a_cut
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IDS = tuple(prompt(22))
DEADLINE_S = 60.0
SLOW = 0.01


def done(run: Run) -> int:
    return sum(sum(stand.positions) for stand in run.standing().stands)


def paused(run: Run, call: Callable[[], object], when: Callable[[], object]) -> None:
    """Pause the run once `when()` holds, while another thread is in a call that moves it; the call then ends."""
    thread = threading.Thread(target=call)
    thread.start()
    wait_for(when, "the call has begun")
    run.pause()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert stands_at_a_cut(run)


def test_play_returns_at_once_and_pause_stops_it(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=4, max_new_tokens=40, paused=True)
    start = done(run)
    run.play("layer", SLOW)
    wait_for(lambda: done(run) > start, "it has stepped")
    assert run.standing().playing
    assert run.pause().state == "paused"
    assert run.standing().playing == ""
    stood = done(run)
    run.play("wave", 100.0)
    assert run.wait(DEADLINE_S).state == "done"
    assert 'undid run.play("wave", 100.0)' in run.undo()
    assert done(run) == stood
    assert stands_at_a_cut(run)


def test_pause_stops_a_step_and_decode(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=1, max_new_tokens=400, paused=True)
    paused(run, lambda: run.step("chunk", 22), lambda: done(run) > 0)
    where = done(run)
    paused(run, lambda: run.decode(400), lambda: run.standing().tokens and max(run.standing().tokens))
    assert 0 < len(run.tokens) < 400
    assert "undid run.decode(400): took back" in run.undo()
    assert (done(run), run.tokens) == (where, [])

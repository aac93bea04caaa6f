"""What a listener raises is put down, and stops neither the run nor those who look after it."""

from __future__ import annotations

import pytest

from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.fixtures import fresh_session
from tests.support.runs import wait_for

DEADLINE_S = 120.0


MODEL = {"layers": 2}
RANKS = 2
session = fresh_session


@pytest.fixture
def run(session: Session) -> Run:
    """A run of 8 tokens in 2 chunks that stands at its start."""
    return session.prefill(list(range(1, 9)), chunk_size=4, paused=True)


def logged(session: Session, text: str) -> int:
    """How often the log has it, once it has it at all."""
    changed = session.ranks.changed
    with changed:
        assert changed.wait_for(lambda: any(text in line for line in session.log), DEADLINE_S)
    return sum(text in line for line in session.log)


def test_a_listener_that_raises_is_told_once_and_the_others_hear(session: Session, run: Run) -> None:
    heard, calls = list[int](), list[int]()

    def broken() -> None:
        calls.append(1)
        raise ValueError("the widget is gone")

    run.on_change(broken)
    run.on_change(lambda: heard.append(1))
    run.step("layer")
    run.step("layer")
    assert logged(session, "the widget is gone") == 1
    assert len(calls) > 1
    told = len(heard)
    run.step("layer")
    wait_for(lambda: len(heard) > told, "the session still looks after its run")


def test_whatever_looking_after_a_run_raises_is_put_down(
    session: Session, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look() -> None:
        raise ValueError("nobody has thought of this")

    monkeypatch.setattr(run, "look", look)
    run.step("layer")
    assert logged(session, "nobody has thought of this") == 1
    monkeypatch.undo()
    run.break_at(layer=1)
    run.resume()
    assert "stopped at #1" in str(run.wait(DEADLINE_S))
    assert logged(session, "stopped at #1")

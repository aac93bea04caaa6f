"""Sessions on threads whose runs stop moving: the verdict comes unasked, and everybody says the same."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from dinfer.engine.decoding import Decoding
from dinfer.engine.ops import HANDLERS, Outcome
from dinfer.magics.line import act
from dinfer.run.failure import RankFailed
from dinfer.run.hang import Hung
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.verdict import waits
from dinfer.verdict.verdict import Verdict
from tests.support.fixtures import fresh_session
from tests.support.runs import DEADLINE_S, wait_for
from tests.support.twin import prompt

IDS = prompt(10)
STUCK_S = 2.0
"""in place of 5"""


session = fresh_session


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "STUCK_S", STUCK_S)


Action = Callable[[Any, Any, Any], Outcome | None]


Break = Callable[[int, str, Action], None]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Break:
    """broken(rank, op, action): in that op do this first; what it gives, if something, is the op's outcome."""

    def set_broken(rank: int, op: str, action: Action) -> None:
        unbroken = HANDLERS[op.split()[0]]

        def wrapped(state: Any, one: Any, comm: Any) -> Outcome:
            if state.rank == rank and str(one) == op and (found := action(state, one, comm)) is not None:
                return found
            return unbroken(state, one, comm)

        monkeypatch.setitem(HANDLERS, op.split()[0], wrapped)

    return set_broken


def begin(session: Session, **parameters: Any) -> Run:
    return session.prefill(IDS, chunk_size=4, **parameters)


def verdict_of(run: Run) -> Verdict:
    """Once it has come unasked."""
    wait_for(lambda: run.hang, f"it is told: {run.where()}")
    return run.verdict()


def is_logged(session: Session, words: str) -> bool:
    return any(words in line for line in session.log)


def check_told(session: Session, run: Run, sentence: str) -> None:
    """`verdict()`, `%dinfer why`, the panel's banner, `where()` and the log say the same sentence."""
    assert run.verdict().sentence == sentence
    shell = type("Shell", (), {"user_ns": {"session": session}})
    assert str(act(shell, "why")).splitlines()[0] == sentence
    assert run.standing().message.splitlines()[0] == sentence
    assert sentence in str(run.where())
    wait_for(partial(is_logged, session, sentence), "the log says it")


def test_a_circle_is_told_by_itself_and_ends_whoever_waits(session: Session) -> None:
    run = begin(session, schedule="batched", unsafe=True)
    with pytest.raises(Hung) as caught:
        run.wait(DEADLINE_S)
    verdict = caught.value.verdict
    assert (verdict.kind, verdict.ranks) == ("cycle", (0, 1, 2))
    assert verdict.sentence.startswith("deadlock: rank 0 waits for rank 1 to take block")
    check_told(session, run, verdict.sentence)
    assert "bytes, link 0→1 (kv)" in str(verdict)
    session.recover()
    assert begin(session).wait(DEADLINE_S).state == "done"


class Door:
    """What a test closes a thread behind, and opens at its end."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def wait_here(self, *_: object) -> None:
        self._event.wait()

    def open(self, *_: object) -> None:
        self._event.set()

    def is_open(self) -> bool:
        return self._event.is_set()


def test_a_rank_that_waits_in_python_is_told_with_its_line(session: Session, broken: Break) -> None:
    door = Door()
    broken(1, "layer c1 l3", door.wait_here)
    run = begin(session)
    verdict = verdict_of(run)
    assert (verdict.kind, verdict.rank) == ("stuck in Python", 1), verdict
    assert verdict.sentence.startswith("rank 1 is in `layer c1 l3` and stuck in Python (")
    assert "× its median" in verdict.sentence
    assert "at `self._event.wait()` in wait_here (test_on_threads.py:" in verdict.sentence
    assert "in wait_here" in verdict.stacks[1]
    assert set(verdict.stacks) == {0, 1, 2}
    check_told(session, run, verdict.sentence)
    for rank in range(3):
        wait_for(partial(is_logged, session, f"rank {rank} stands at:"), "its stacks are logged")
    with pytest.raises(Hung):
        run.wait(DEADLINE_S)
    door.open()
    wait_for(lambda: not run.hang, "it moves again")
    assert run.wait(DEADLINE_S).state == "done"
    wait_for(lambda: session.log[-1].endswith("the run moves again"), "the log says it")


def test_a_call_into_c_is_told_as_that(session: Session, broken: Break) -> None:
    c, (end, begin_of_pipe) = ctypes.CDLL(None), os.pipe()

    def reads(*_: object) -> None:
        c.read(end, ctypes.create_string_buffer(1), 1)  # lets other threads go on

    broken(2, "layer c0 l5", reads)
    run = begin(session)
    try:
        verdict = verdict_of(run)
        assert (verdict.kind, verdict.rank) == ("stuck in C", 2), verdict
        assert "`c.read(end, " in verdict.sentence
    finally:
        os.write(begin_of_pipe, b"1")
    wait_for(lambda: run.standing().state == "done", "it goes on by itself")
    os.close(end)
    os.close(begin_of_pipe)


def test_who_computes_is_not_called_hung(session: Session, broken: Break) -> None:
    door = Door()

    def spin(*_: object) -> None:
        while not door.is_open():
            pass

    broken(1, "layer c1 l3", spin)
    run = begin(session)
    try:
        verdict = verdict_of(run)
        assert (verdict.kind, verdict.rank, verdict.is_hung) == ("computing", 1, False)
        assert "and still computing (" in run.hang
        run.check()
    finally:
        door.open()  # or the tests after this one would find its thread
    assert run.wait(DEADLINE_S).state == "done"


def test_a_message_that_is_left_out_is_told_by_who_misses_it(session: Session, broken: Break) -> None:
    """The next one comes in its place: whoever gets that raises, and is not to blame."""
    op = "send kv c0 l1 -> 1, 4 tokens"
    broken(0, op, lambda *_: Outcome())
    run = begin(session, schedule="lockstep")
    with pytest.raises(RankFailed, match="and not sent it: at"):
        run.wait(DEADLINE_S)
    verdict = run.verdict()
    assert (verdict.kind, verdict.rank, verdict.peer) == ("never sent", 0, 1)
    assert verdict.sentence.startswith(
        f"missing send: rank 0 has passed `{op}` and not sent it: at `recv kv c0 l1"
    )
    check_told(session, run, verdict.sentence)
    assert "TransferError" in run.failure


def test_the_last_message_is_missed_too(session: Session, broken: Break) -> None:
    op = "send final -> 0, 1 token"
    broken(2, op, lambda *_: Outcome())
    run = begin(session)
    verdict = verdict_of(run)
    assert (verdict.kind, verdict.rank, verdict.peer) == ("never sent", 2, 0), verdict


def test_an_exception_is_told_as_the_failure_is(session: Session, broken: Break) -> None:
    def boom(*_: object) -> None:
        raise RuntimeError("boom")

    broken(1, "layer c1 l3", boom)
    run = begin(session)
    with pytest.raises(RankFailed):
        run.wait(DEADLINE_S)
    verdict = run.verdict()
    assert (verdict.kind, verdict.rank) == ("exception", 1)
    assert "RuntimeError: boom" in verdict.sentence
    assert "`layer c1 l3`" in verdict.sentence
    wait_for(lambda: run.verdict().blocked == (0, 2), "the others wait")
    check_told(session, run, verdict.sentence)


def closed_at_token(monkeypatch: pytest.MonkeyPatch, rank: int, token: int) -> Door:
    """That rank does not make that new token before the door is opened."""
    door, unbroken = Door(), Decoding.step

    def step(self: Decoding) -> int:
        if self._comm.rank == rank and len(self.tokens) == token:
            door.wait_here()
        return unbroken(self)

    monkeypatch.setattr(Decoding, "step", step)
    return door


@pytest.mark.parametrize("token", [0, 2])
def test_a_token_that_one_rank_does_not_make(
    session: Session, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    door = closed_at_token(monkeypatch, 1, token)
    run = begin(session, max_new_tokens=4)
    run.wait(DEADLINE_S)
    try:
        with pytest.raises(Hung) as caught:
            run.decode()
    finally:
        door.open()
    verdict = caught.value.verdict
    assert (verdict.kind, verdict.rank) == ("stuck in Python", 1)
    assert verdict.sentence.startswith(f"rank 1 computes token {token} and stuck in Python (")
    assert verdict.sentence.endswith("ranks 0 and 2 wait for it")


def test_the_time_between_two_decodes_is_no_ranks_standing_still(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, pause_s = begin(session, max_new_tokens=8), 1000.0
    run.decode(2)
    with session.ranks.changed:
        for state in session.ranks.ranks:
            state.progressed -= pause_s  # the user reads
    wait_for(lambda: run._health._watch._decoding_since is None, "it was seen that nobody decodes")
    door = closed_at_token(monkeypatch, 1, 2)
    with pytest.raises(Hung) as caught:
        run.decode(2)
    door.open()
    waits = caught.value.verdict.waits
    assert waits
    assert max(wait.still_s for wait in waits.values()) < pause_s, caught.value


def test_a_run_that_moves_stands_or_is_done_has_no_verdict(session: Session) -> None:
    run = begin(session, paused=True)
    assert (run.verdict().kind, run.hang) == ("paused", "")
    run.step("layer", 3)
    assert run.verdict().kind == "paused"
    run.resume()
    run.wait(DEADLINE_S)
    assert (run.verdict().kind, str(run.verdict()).splitlines()[0]) == ("done", "the run is done")
    run.decode(2)
    assert run.verdict().kind == "done"


def test_who_holds_the_line_may_judge_while_another_asks(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks the ranks waits for the line, as whoever waits for the run does while it judges a failure."""
    run = begin(session, paused=True)
    asks, held = threading.Event(), threading.Event()

    def gather(*_: object) -> dict[int, Any]:
        asks.set()
        assert held.wait(DEADLINE_S)
        with session.ranks.changed:
            return {}

    monkeypatch.setattr("dinfer.monitor.watch.gather", gather)
    asking = threading.Thread(target=run._health.judge, kwargs={"is_moving": True})
    asking.start()
    assert asks.wait(DEADLINE_S)
    with session.ranks.changed:
        held.set()
        assert run._health.judge(is_moving=False)
        run._health.look()
    asking.join(DEADLINE_S)
    assert not asking.is_alive()

"""Decode that begins while prefill's blocks are still on their way, in a session: the same tokens, sooner; and a run
that stops meanwhile stands as if nothing had begun."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from dinfer.engine.ops import HANDLERS, Outcome
from dinfer.engine.prefill import Prefill
from dinfer.plan.ops import Op
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.trace.events import Event
from dinfer.transport.gloo import Comm
from tests.support.fixtures import fresh_session
from tests.support.runs import wait_for
from tests.support.twin import prompt
from tests.unit.run.test_decoding import begin, hosts

IDS = prompt(10)
session = fresh_session


class Late:
    """Holds back one block on its way to rank 0 until it is let go, and so all that follow it from the same rank."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.place = threading.Event(), (-1, -1)
        recv = HANDLERS["recv"]

        def late(state: Prefill, op: Op, comm: Comm) -> Outcome:
            if state.rank == 0 and op.what == "kv" and (op.chunk, op.layer) == self.place:
                assert self.go.wait(60)
            return recv(state, op, comm)

        monkeypatch.setitem(HANDLERS, "recv", late)


@pytest.fixture
def late(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Run, Late]]:
    """A run, and what holds back a block of its last layer."""
    run, held = session.prefill(IDS, chunk_size=4, max_new_tokens=8, paused=True), Late(monkeypatch)
    yield run, held
    held.go.set()


def decode_events(session: Session, rank: int = 0) -> list[Event]:
    engine = hosts(session)[rank].engine
    assert engine
    assert engine.recorder
    return [event for event in engine.recorder.events() if event.kind == "decode"]


def layers_on(session: Session, rank: int = 0) -> int:
    return sum(event.layer is not None for event in decode_events(session, rank))


def wait_until_begun(session: Session, layers: int) -> None:
    """Rank 0 has run so many layers on its first token."""
    wait_for(lambda: layers_on(session) == layers, f"decode has run {layers} layers")


def stands_at_limits_but_for_the_late_one(session: Session) -> bool:
    stands = [service.engine.executor.stand() for service in hosts(session) if service.engine]
    return all(
        limit == position + begun
        for stand in stands
        for position, begun, limit in zip(stand.positions, stand.started, stand.limits, strict=True)
    )


def usual(session: Session) -> list[int]:
    """The tokens of a run whose decode begins after its prefill."""
    run = session.prefill(IDS, chunk_size=4, max_new_tokens=8)
    run.wait(60)
    run.decode()
    assert not layers_on(session)
    return run.tokens


def test_layers_decode_while_a_block_is_on_its_way(session: Session, late: tuple[Run, Late]) -> None:
    run, held = late
    texts: list[str] = []
    shape = run.plan.shape
    held.place = len(shape.chunks) - 1, shape.layers - 1
    thread, came = begin(lambda: run.decode(on_text=texts.append))
    wait_until_begun(session, shape.layers - 1)
    run.look()
    assert run.standing().state == "running", "prefill has not ended"
    assert run.text, "the first token is shown"
    assert run.tokens == []
    held.go.set()
    thread.join(60)
    (found,) = came
    assert len(found.tokens) == 8
    assert "".join(texts) == found.text == run.text
    trace = run.trace
    assert trace.ttft_s is not None
    assert trace.ttft_s < trace.rank_figures(0).prefill_s
    assert all(rank.decode_s > 0 for rank in (trace.rank_figures(n) for n in range(3)))
    assert run.kv().diff().equal
    assert run.compare("reference").equal
    assert run.tokens == usual(session)


def test_a_run_that_is_paused_meanwhile_stands_in_prefill(session: Session, late: tuple[Run, Late]) -> None:
    """What has been begun is given up: undo, steps and edits find prefill as it was."""
    run, held = late
    shape = run.plan.shape
    held.place = 0, shape.layers - 1
    thread, came = begin(run.decode)
    wait_until_begun(session, shape.starts[-1])  # as many as have blocks of other ranks than the last
    pausing, _ = begin(run.pause)
    wait_for(lambda: stands_at_limits_but_for_the_late_one(session), "the ranks heard of the pause")
    held.go.set()
    thread.join(60)
    pausing.join(60)
    (found,) = came
    assert run.standing().state == "paused"
    assert found.tokens == ()
    assert run.tokens == []
    assert run.text == ""
    run.step_back("layer", 2)
    run.step("layer")
    assert not run.edited
    run.decode()
    assert run.kv().diff().equal
    assert run.compare("reference").equal
    run.undo()
    assert run.tokens == []
    run.decode()
    assert run.tokens == usual(session)


def whole_decode_follows(session: Session, run: Run) -> None:
    """Nothing of the call before is left, and the next one tells of all tokens, once."""
    assert (run.tokens, run.text) == ([], "")
    texts: list[str] = []
    found = run.decode(on_text=texts.append)
    assert "".join(texts) == found.text == run.text
    assert list(found.tokens) == run.tokens == usual(session)


def test_a_pause_at_the_very_end_of_prefill_leaves_no_text(
    session: Session, late: tuple[Run, Late], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, held = late
    held.place = len(run.plan.shape.chunks) - 1, run.plan.shape.layers - 1
    finish, shown = run._moves.finish, list[str]()

    def stopped(*args: Any) -> bool:
        ended = finish(*args)
        run._generation.stop()
        run.look()
        shown.append(run.text)
        return ended

    monkeypatch.setattr(run._moves, "finish", stopped)
    thread, came = begin(run.decode)
    wait_until_begun(session, run.plan.shape.layers - 1)
    held.go.set()
    thread.join(60)
    (found,) = came
    assert (found.tokens, found.text, found.stopped) == ((), "", "user")
    assert shown[0], "the first token was shown"
    monkeypatch.undo()
    whole_decode_follows(session, run)


def test_an_interrupt_in_prefill_leaves_no_text(
    session: Session, late: tuple[Run, Late], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, held = late
    held.place = len(run.plan.shape.chunks) - 1, run.plan.shape.layers - 1
    stepper, shown = run._moves.stepper, list[str]()
    wait = stepper.wait

    def interrupted(timeout: float | None) -> None:
        wait_until_begun(session, run.plan.shape.layers - 1)
        held.go.set()
        wait(timeout)
        run.look()
        shown.append(run.text)
        raise KeyboardInterrupt

    monkeypatch.setattr(stepper, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.decode()
    assert shown[0], "the first token was shown"
    monkeypatch.undo()
    whole_decode_follows(session, run)

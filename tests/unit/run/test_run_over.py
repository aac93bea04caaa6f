"""A run that is over: halted before its ranks are another's, and of those it then neither asks nor changes anything."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinfer.cluster.kv import Live
from dinfer.cluster.lease import RunOver
from dinfer.cluster.threads import LocalRanks
from dinfer.messages import Ok, ReferenceReport, RunReference, StopReference
from dinfer.rank.commands import quick, slow, table_of
from dinfer.run.inspect import RunInspector
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.verdict.verdict import Verdict
from tests.support.expected import lane_threads
from tests.support.fixtures import fresh_session

LAYERS = 3
LONG = [1 + n % 60 for n in range(400)]
"""a run of it in chunks of 2 takes seconds"""
SHORT = [1 + n for n in range(24)]
DEADLINE_S = 120.0


MODEL = {"layers": LAYERS}
RANKS = 2
session = fresh_session


BEGUN = "another run has begun; session.debugger() shows it"


def moving(session: Session) -> Run:
    """A run that has far to go."""
    run = session.prefill(LONG, chunk_size=2)
    assert run.standing().state == "running"
    return run


def begin(session: Session, **parameters: Any) -> Run:
    return session.prefill(SHORT, chunk_size=8, paused=True, **parameters)


# -- what moves is halted first


def test_a_run_that_moves_makes_room_for_the_next(session: Session) -> None:
    old = moving(session)
    new = session.prefill(SHORT, chunk_size=8)
    new.wait(DEADLINE_S)
    assert (new.standing().state, old.standing().state) == ("done", "closed")
    assert new.kv().diff().equal


def test_a_run_that_moves_can_begin_anew(session: Session) -> None:
    run = moving(session)
    run.restart()
    assert run.standing().state == "paused"
    assert not any(any(stand.positions) for stand in run.standing().stands)
    run.resume()
    run.wait(DEADLINE_S)
    assert run.compare("reference").equal


def test_another_checkpoint_is_loaded_while_a_run_moves(session: Session, model: Path) -> None:
    moving(session)
    session.load(str(model), dtype="bfloat16", threads=1)
    assert not [name for name in lane_threads() if name.startswith("rank 0")], "it held the weights"
    run = begin(session)
    run.resume()
    run.wait(DEADLINE_S)
    assert run.kv().diff().equal


def test_decode_ends_after_a_token_where_another_run_begins(session: Session) -> None:
    old = session.prefill(SHORT, chunk_size=8, max_new_tokens=20_000)
    said = list[object]()

    def decode() -> None:
        try:
            said.append(old.decode())
        except RuntimeError as error:
            said.append(error)

    assert isinstance(session.ranks, LocalRanks)
    for host in session.ranks.hosts:
        assert host.decoder
        host.decoder.eos_ids = frozenset()
    thread = threading.Thread(target=decode)
    thread.start()
    with session.ranks.changed:
        assert session.ranks.changed.wait_for(lambda: session.ranks.ranks[1].decoded > 1, DEADLINE_S)
    new = begin(session)
    thread.join(DEADLINE_S)
    assert len(said) == 1
    new.resume()
    new.wait(DEADLINE_S)
    assert new.kv().diff().equal


def test_who_steps_while_another_run_begins_is_told(session: Session) -> None:
    old = session.prefill(LONG, chunk_size=2, paused=True)
    said = list[str]()
    began = threading.Event()

    def step() -> None:
        try:
            while True:
                old.step("layer")
                began.set()
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=step)
    thread.start()
    assert began.wait(DEADLINE_S)
    new = session.prefill(SHORT, chunk_size=8)
    new.wait(DEADLINE_S)
    thread.join(DEADLINE_S)
    assert "this run is over" in said[0]
    assert new.kv().diff().equal


def test_a_breakpoint_ahead_is_not_met_by_beginning_anew(session: Session) -> None:
    run = session.prefill(LONG, chunk_size=2, paused=True)
    run.break_at(chunk=190, layer=1)
    run.resume()
    run.restart()
    run.look()
    assert "stopped at" not in str(run.where())
    assert not run.story


def test_the_stuck_ranks_are_those_of_such_a_verdict(session: Session) -> None:
    run = begin(session)
    begin(session)  # so that nobody judges the first any more
    assert run.stuck_ranks() == ()
    for kind, ranks in (("stuck in C", (1,)), ("cycle", ())):
        run._state.note_hang(Verdict(kind, "why", (1,)))  # type: ignore[arg-type]
        assert run.stuck_ranks() == ranks


# -- it keeps to itself


def test_faults_and_breakpoints_of_the_run_after_it_stay(session: Session) -> None:
    old = begin(session)
    old.inject("zero", layer=1, chunk=1)
    new = begin(session)
    new.inject("bitflip", layer=1, chunk=1, rank=1)
    new.break_at(layer=1, when="absmax > 0")
    for call in (old.faults.clear, old.breakpoints.clear, old.sha256):
        with pytest.raises(RunOver, match=r"this run is over.*another run has begun"):
            call()
    assert len(old.faults) == 1, "it is a list of what was armed, and nothing was disarmed"
    new.resume()
    assert "stopped at #1" in str(new.wait(DEADLINE_S))
    new.breakpoints.clear()
    new.resume()
    new.wait(DEADLINE_S)
    assert new.faults[1].has_struck


def test_what_was_looked_at_is_not_fetched_from_the_run_after_it(session: Session) -> None:
    old = begin(session)
    old.run_to(1, 1)
    kv, part, hidden = old.kv(), old.kv(layer=1).k, old.hidden(chunk=0, layer=1)
    begin(session).run_to(1, 1)
    assert kv.diff().equal, "by the digests that were kept"
    looks: tuple[Callable[[], object], ...] = (lambda: part[0, :2], lambda: hidden[0], lambda: str(hidden))
    for look in looks:
        with pytest.raises(RuntimeError, match="this run is over, and its ranks hold its KV no more"):
            look()


@pytest.mark.parametrize(("where", "what"), [(Live, "noted"), (RunInspector, "live")])
def test_whoever_looks_while_another_run_begins_has_seen_the_old_one(
    session: Session, where: type, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = begin(session)
    old.run_to(1, 1)
    ask, new = getattr(where, what), list[Run]()
    beginning = threading.Thread(target=lambda: new.append(begin(session)))

    def asked(self: Any, *given: Any) -> Any:
        found = ask(self, *given)
        if beginning.ident is None:
            beginning.start()
            with session.ranks.changed:
                assert session.ranks.changed.wait_for(
                    lambda: bool(old._state.ending or old.closed), DEADLINE_S
                )
        return found

    monkeypatch.setattr(where, what, asked)
    monkeypatch.setattr(
        "dinfer.cluster.ranks.ASK_S", DEADLINE_S
    )  # what takes longer is broken off, see below
    assert (old.kv().diff() if where is Live else old.compare("reference")).equal
    beginning.join(DEADLINE_S)
    monkeypatch.undo()
    new[0].resume()
    new[0].wait(DEADLINE_S)
    assert new[0].compare("reference").equal


def test_it_tells_where_its_own_ranks_stood(session: Session) -> None:
    old = begin(session, schedule="lockstep")
    old.step("chunk")
    stands, events = old.standing().stands, old.trace.events
    before = str(old.where()).splitlines()[1:3]
    new = begin(session)
    new.resume()
    new.wait(DEADLINE_S)
    assert old.standing().stands == stands
    assert old.standing().state == "closed"
    assert old.standing().over == BEGUN
    assert new.standing().over == ""
    assert str(old.where()).splitlines()[1:] == [*before, BEGUN]
    assert before[0] in str(old)
    assert old.trace.events == events
    assert old.findings().positions == tuple(stand.positions for stand in stands)
    assert "told to stop" in old.verdict().sentence


def test_a_comparison_that_takes_long_is_broken_off_where_another_run_begins(session: Session) -> None:
    old = begin(session)
    old.run_to(1, 1)
    asked, stopped, said = threading.Event(), threading.Event(), list[str]()

    def take_long(_: RunReference) -> ReferenceReport:
        asked.set()
        assert stopped.wait(DEADLINE_S), "nobody has stopped the reference"
        raise RuntimeError("the reference was stopped")

    def stop(_: StopReference) -> Ok:
        stopped.set()
        return Ok()

    def compare() -> None:
        with pytest.raises(RunOver) as raised:
            old.compare("reference")
        said.append(str(raised.value))

    assert isinstance(session.ranks, LocalRanks)
    for table in session.ranks._tables:
        table |= table_of([slow(RunReference, take_long), quick(StopReference, stop)])
    thread = threading.Thread(target=compare)
    thread.start()
    assert asked.wait(DEADLINE_S)
    new = begin(session)
    thread.join(DEADLINE_S)
    assert said == [f"this run is over, and its ranks hold its KV no more: {BEGUN}"]
    assert new.standing().state == "paused"

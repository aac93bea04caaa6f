"""Bytes that change while a session's run goes: recorded, paused at, or failed by, as its user chose."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from dinfer.cluster.ranks import RankRefused
from dinfer.config import Config, ConfigError
from dinfer.engine.engine import Engine
from dinfer.job import prepare
from dinfer.plan.cut import UNITS
from dinfer.plan.ops import Op, PlanError
from dinfer.results import Moved
from dinfer.run.failure import RankFailed
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.runs import wait_for
from tests.support.threads import engines, stands_at_a_cut
from tests.support.twin import prompt

IDS = tuple(prompt(10))
DEADLINE_S = 120.0
SENTENCE = "rank 2 received a changed K of block c1 l0 from rank 0: the block changed on the way or before it was sent"


MODEL = {"layers": 3}


def begun(session: Session, **parameters: Any) -> Run:
    return session.prefill(IDS, paused=True, chunk_size=4, max_new_tokens=3, **parameters)


def engine_of(session: Session, rank: int) -> Engine:
    engine = engines(session)[rank]
    assert isinstance(engine, Engine)
    return engine


def flip(block: Tensor) -> None:
    """One bit, behind torch's back."""
    block.data[1, 0, 1].view(torch.int32)[1] ^= 1


def break_wire(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block c1 l0 changes on its way to rank 2."""

    def on_wire(op: Op, block: Tensor) -> None:
        if (op.chunk, op.layer) == (1, 0):
            flip(block)

    monkeypatch.setattr(engine_of(session, 2).executor.state.faults, "on_wire", on_wire)


def corrupt_events(run: Run) -> list[tuple[int | None, ...]]:
    events = [event for event in run.trace.events if event.kind == "corrupt"]
    return [(event.rank, event.chunk, event.layer, event.peer) for event in events]


def test_by_default_it_is_recorded_and_the_run_goes_on(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(session)
    break_wire(session, monkeypatch)
    run.resume()
    run.wait(DEADLINE_S)
    wait_for(lambda: run.message == SENTENCE, "the news has come")
    assert run.standing().state == "done"
    assert [str(found) for found in run.corrupt] == [SENTENCE]
    assert SENTENCE in str(run.where())
    wait_for(lambda: any(SENTENCE in line for line in session.log), "the news has come")
    wait_for(lambda: corrupt_events(run) == [(2, 1, 0, 0)], "its event has come")
    run.step_back("layer")  # the sentence stays, whatever is done next
    assert f"changed bytes: {SENTENCE}" in str(run.where())


def test_a_run_pauses_at_a_cut_and_goes_on(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(session, on_corruption="pause")
    break_wire(session, monkeypatch)
    run.resume()
    run.wait(DEADLINE_S)
    wait_for(lambda: run.message == f"stopped: {SENTENCE}", "the news has come")
    assert stands_at_a_cut(run)
    wait_for(lambda: any(f"stopped: {SENTENCE}" in line for line in session.log), "the news has come")
    run.resume()
    run.wait(DEADLINE_S)
    assert run.standing().state == "done"
    assert len(run.corrupt) == 1


def test_a_step_is_stopped_too(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(session, on_corruption="pause")
    break_wire(session, monkeypatch)
    moved = run.step("layer", 8)
    assert isinstance(moved, Moved)
    assert moved.stopped
    assert SENTENCE in str(moved)
    assert stands_at_a_cut(run)


def test_a_run_fails_with_op_and_block(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(session, on_corruption="fail")
    break_wire(session, monkeypatch)
    run.resume()
    with pytest.raises(RankFailed, match=r"rank 2 failed at `recv kv c1 l0 <- 0, 4 tokens`") as caught:
        run.wait(DEADLINE_S)
    assert SENTENCE in str(caught.value)
    session.recover()


def test_memory_is_checked_before_decode_and_again_after_going_back(session: Session) -> None:
    run = begun(session)
    run.run_to(chunk=2, layer=2)
    state = engine_of(session, 1).executor.state
    flip(state.block(2, 2))
    run.decode(2)
    said = "rank 1: K of block c2 l2 changed in memory (head 1, token 9)"
    wait_for(lambda: [str(found) for found in run.corrupt] == [said], "the news has come")
    assert said in str(run.where())
    run.step("token")
    run.step_back("layer")  # which computes it anew
    run.decode(2)
    flip(state.block(0, 1))
    run.step_back("layer")
    run.decode(1)
    again = "rank 1: K of block c0 l1 changed in memory (head 1, token 1)"
    wait_for(lambda: [str(found) for found in run.corrupt] == [said, again], "the news has come")


def test_decode_pauses_once_for_changed_memory(session: Session) -> None:
    run = begun(session, on_corruption="pause")
    run.run_to(chunk=2, layer=2)
    flip(engine_of(session, 0).executor.state.block(0, 1))
    said = run.decode(2)
    assert said.tokens == ()
    assert "before decode: rank 0: K of block c0 l1 changed in memory (head 1, token 1)" in str(said)
    assert len(run.decode(2).tokens) == 2


def test_decode_fails_for_changed_memory_until_it_is_computed_anew(session: Session) -> None:
    run = begun(session, on_corruption="fail")
    run.run_to(chunk=2, layer=2)
    flip(engine_of(session, 0).executor.state.block(2, 0))
    for _ in range(2):
        with pytest.raises(
            RankRefused, match=r"rank 0: K of block c2 l0 changed in memory .*on_corruption is fail"
        ):
            run.decode(2)
    run.run_to(chunk=0, layer=2)  # at which block c2 l0 is not there
    assert len(run.decode(2).tokens) == 2


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
def test_a_block_edited_before_it_is_sent_is_nobodys_fault(
    session: Session, schedule: str, strategy: str
) -> None:
    run = begun(session, schedule=schedule, sync_strategy=strategy, on_corruption="fail")
    owner = engine_of(session, 0)
    while not owner.executor.holds_block(0, 0):
        run.step("op")
    owner.kv(0).k[0, 1] = 0.25
    run.resume()
    run.wait(DEADLINE_S)
    assert run.edited == ["KV of layer 0 on rank 0"]
    assert len(set(run.sha256())) == 1
    assert owner.executor.state.ledger.entries[0, 0].edited
    assert len(run.decode(2).tokens) == 2
    assert run.corrupt == []


@pytest.mark.parametrize("seed", range(6))
def test_a_user_who_steps_edits_and_goes_back_is_never_accused(session: Session, seed: int) -> None:
    random = Random(seed)
    run = begun(
        session,
        schedule=random.choice(("pipelined", "lockstep")),
        sync_strategy=random.choice(("pairwise", "ring")),
        on_corruption="fail",
    )
    for _ in range(20):
        match random.randrange(4):
            case 0:
                run.step_back(random.choice(UNITS), random.randint(1, 2))
            case 1:
                _edit(engine_of(session, random.randrange(3)), random)
            case _:
                run.step(random.choice(UNITS), random.randint(1, 3))
    run.resume()
    run.wait(DEADLINE_S)
    for rank in range(3):
        engine = engine_of(session, rank)
        engine.prompt.detect_edits()
        assert [key for key in engine.executor.state.ledger.entries if _differs(engine, key)] == []
    assert run.corrupt == []


def _edit(engine: Engine, random: Random) -> None:
    held = engine.kv(random.randrange(3))
    if held.tokens:
        held.k[random.randrange(2), random.randrange(held.tokens)] += random.random()


def _differs(engine: Engine, key: tuple[int, int]) -> bool:
    state = engine.executor.state
    return bool(state.ledger.changed(key, state.block(*key)).any())


def test_a_breakpoint_on_digests_takes_digests(session: Session) -> None:
    run = begun(session, digests=False)
    with pytest.raises(PlanError, match="this run has digests=False: start it with digests=True"):
        run.break_at(when="digest differs")
    assert len(begun(session).break_at(when="digest differs").when) > 0


def test_a_run_without_a_session_cannot_pause(model: Path) -> None:
    config = Config(model_path=str(model), prompt_ids=IDS, on_corruption="pause")
    with pytest.raises(
        ConfigError, match=r"on_corruption is pause, but only a session .*: use record or fail"
    ):
        prepare(config)

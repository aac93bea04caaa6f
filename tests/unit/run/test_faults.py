"""Faults through a session's own calls: what a user may break, what is shown of it, and what going back undoes."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from dinfer.engine.engine import Engine
from dinfer.plan.ops import PlanError
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.views.status import status
from dinfer.views.still import still_html
from tests.support.broken import IN_PLACE, broken_block, in_shadow, words
from tests.support.expected_tokens import expected
from tests.support.injections import DTYPES, WORLD_SIZES, Injection, random_fault, random_prompt, random_setup
from tests.support.threads import engines, session_on_threads
from tests.support.twin import prompt

IDS = tuple(prompt(10))
NEW_TOKENS = 5
DEADLINE_S = 120.0


MODEL = {"layers": 4}


@pytest.fixture
def run(session: Session) -> Run:
    return begin(session)


def begin(session: Session, **given: Any) -> Run:
    parameters = {"chunk_size": 4, "max_new_tokens": NEW_TOKENS, "sync_strategy": "ring", **given}
    return session.prefill(IDS, paused=True, **parameters)


def finish(run: Run) -> None:
    run.resume()
    assert run.wait(DEADLINE_S).state == "done"


def clean(model: Path) -> str:
    return expected(model, IDS, 4, NEW_TOKENS).kv_sha256


# -- what is shown


def test_a_fault_is_shown_wherever_the_run_is_until_it_is_disarmed(run: Run) -> None:
    injected = run.inject("bitflip", rank=2, layer=1, chunk=1, tensor="K", head=1, token=6, where="memory")
    line = "#1 bitflip in K of block c1 l1 on rank 2, head 1, token 6, in memory"
    for shown in (
        str(injected),
        str(run.where()),
        str(run),
        str(run.faults),
        still_html(run.plan, run.standing(), [""] * 3),
    ):
        assert f"armed: {line}" in shown
    assert status(run.plan, run.standing())["faults"] == [f"armed: {line}"]
    assert run.last_call.startswith('run.inject("bitflip", rank=2')
    finish(run)
    assert status(run.plan, run.standing())["faults"] == [f"hit: {line}: 1 of 256 values changed"]
    assert (injected.has_struck, injected.strikes) == (True, [(2, 1, "1 of 256 values changed")])
    assert run.edited == []
    run.faults.clear()
    assert status(run.plan, run.standing())["faults"] == []
    assert "what #1 changed stays changed until run.restart()" in str(run.where())
    assert "no faults" in str(run.faults)


def test_the_log_tells_of_strikes(session: Session, run: Run) -> None:
    run.inject("zero", layer=0, chunk=2)
    finish(run)
    session._look_after(run)
    assert any("fault #1 zero in K of block c2 l0 on rank 1" in line for line in session.log)


def test_faults_are_numbered_and_removed_one_by_one(run: Run) -> None:
    for layer in (0, 1, 2):
        run.inject("lost", layer=layer, chunk=0)
    assert [one.number for one in run.faults] == [1, 2, 3]
    run.faults.remove(2)
    assert [one.number for one in run.faults] == [1, 3]
    assert run.inject("lost", layer=1, chunk=0).number == 4
    with pytest.raises(KeyError, match=r"there is no fault #2; there are: armed: #1 lost"):
        run.faults.remove(2)
    finish(run)
    assert [one.has_struck for one in run.faults] == [True, True, True]


def test_one_that_changes_nothing_says_so(run: Run) -> None:
    finish(run)
    first, second = (run.inject("zero", layer=1, chunk=0, rank=2) for _ in range(2))
    assert (first.strikes[0][1], second.strikes[0][1]) == (16, 0)
    assert str(second).endswith("in memory: struck, but changed no byte")


# -- going back and beginning anew


def test_it_strikes_again_after_a_restart_and_the_run_is_clean_once_disarmed(model: Path, run: Run) -> None:
    run.inject("nan", layer=1, chunk=1, rank=2)
    for _ in range(2):
        finish(run)
        assert [sha == clean(model) for sha in run.sha256()] == [True, True, False]
        assert len(run.faults[1].strikes) == 1
        run.restart()
        assert not run.faults[1].has_struck
    run.faults.clear()
    finish(run)
    assert run.sha256() == [clean(model)] * 3


def test_it_strikes_again_after_going_back_and_clearing_does_not_mend(model: Path, run: Run) -> None:
    run.inject("swap_kv", layer=1, chunk=1, where="wire", rank=2)
    finish(run)
    run.run_to(chunk=0, layer=3)
    finish(run)
    assert str(run.faults[1]).endswith("256 of 256 values changed (2 times)")
    wrong = run.sha256()
    run.faults.clear()
    assert run.sha256() == wrong
    assert [sha == clean(model) for sha in wrong] == [True, True, False]
    run.run_to(chunk=0, layer=3)
    finish(run)
    assert run.sha256() == [clean(model)] * 3


def test_stepping_and_decoding_with_a_fault_of_all_ranks_gives_another_text(model: Path, run: Run) -> None:
    run.inject("repeat_row")
    decoded = run.decode(NEW_TOKENS)
    assert len(decoded.tokens) == NEW_TOKENS
    assert list(decoded.tokens) != expected(model, IDS, 4, NEW_TOKENS).tokens
    assert {rank for rank, _, _ in run.faults[1].strikes} == {0, 1, 2}
    assert "row 10 of every layer is there twice, and so is each after it" in str(run.where())
    run.faults.clear()
    run.step_back("token", NEW_TOKENS)
    assert list(run.decode(NEW_TOKENS).tokens) == expected(model, IDS, 4, NEW_TOKENS).tokens
    assert run.edited == []


def test_one_rank_may_hold_twice_the_rows_of_a_layer(session: Session) -> None:
    run = begin(session, chunk_size=16)
    run.inject("append_twice", rank=0, layer=3, chunk=0)
    finish(run)
    held = [engine.executor.state.extra for engine in ranks_of(session)]
    assert held == [{3: 10}, {}, {}]
    rows = ranks_of(session)[0].executor.state.cache.block(3, 0, 20)
    assert torch.equal(rows[:10], rows[10:])
    assert "rank 0 now holds 20 rows of the prompt in layer 3" in str(run)
    run.faults.clear()
    run.step_back("chunk")
    assert ranks_of(session)[0].executor.state.extra == {}


# -- what cannot be


def test_a_block_that_is_there_cannot_break_on_its_way(run: Run) -> None:
    run.run_to(chunk=1, layer=1)
    before = r"go back before it \(run\.step_back\(…\), or run\.run_to\(…\) to a block before it\)"
    with pytest.raises(
        PlanError, match=rf"block c1 l1 has been computed already: {before}, or use where='memory'"
    ):
        run.inject("bitflip", layer=1, chunk=1, where="compute")
    with pytest.raises(PlanError, match=rf"block c1 l1 has arrived on rank 2 already: {before}, or use"):
        run.inject("bitflip", layer=1, chunk=1, where="wire", rank=2)
    with pytest.raises(PlanError, match=rf"block c0 l0 has been computed already: {before}\."):
        run.inject("positions", layer=0, chunk=0)
    assert len(run.faults) == 0
    run.inject("bitflip", layer=1, chunk=2, where="compute")
    run.step_back("chunk")
    run.inject("positions", layer=1, chunk=1)
    assert len(run.faults) == 2


def test_a_run_that_moves_is_not_broken(session: Session) -> None:
    run, go = begin(session), threading.Event()

    def stay(*_: object) -> None:
        go.wait(DEADLINE_S)

    ranks_of(session)[0].executor.on_op = stay
    try:
        run.resume()
        with pytest.raises(
            PlanError, match=r"the run is moving, so what a fault meets would be luck: run\.pause\(\)"
        ):
            run.inject("lost", layer=2, chunk=2)
    finally:
        go.set()
    assert run.wait(DEADLINE_S).state == "done"
    assert len(run.faults) == 0


def test_what_the_plan_does_not_have_is_refused_before_a_rank_hears_of_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(run)
    told: list[Any] = []
    monkeypatch.setattr(run.faults, "_tell", told.append)
    for given, said in (
        ({"layer": 4, "chunk": 0}, "layer is 4; the layers of this run go from 0 to 3"),
        ({"layer": 0, "chunk": 0, "head": 2}, "this model's KV heads go from 0 to 1"),
        ({"layer": 0, "token": 10}, "the prompt's tokens go from 0 to 9"),
    ):
        with pytest.raises(PlanError, match=said):
            run.inject("nan", **given)  # type: ignore[arg-type]
    assert told == []


def test_a_run_that_is_over_is_not_broken(session: Session, run: Run) -> None:
    begin(session)
    with pytest.raises(RuntimeError, match="this run is over: another run has begun"):
        run.inject("nan", layer=0, chunk=0)


# -- drawn at random


def ranks_of(session: Session) -> list[Engine]:
    found = engines(session)
    assert all(isinstance(engine, Engine) for engine in found)
    return found  # type: ignore[return-value]


def snapshot(session: Session, tokens: int) -> list[list[torch.Tensor]]:
    """By rank and layer, the rows held."""
    found = []
    for engine in ranks_of(session):
        state = engine.executor.state
        found.append(
            [
                state.cache.block(n, 0, tokens + state.extra.get(n, 0)).clone()
                for n in range(state.cache.layers)
            ]
        )
    return found


def check(
    run: Run, injected: Injection, before: list[list[torch.Tensor]], after: list[list[torch.Tensor]]
) -> None:
    """Exactly what was to break differs from the clean run."""
    fault, chunks = run.faults[1].fault, run.plan.shape.chunks
    for rank, layers in enumerate(after):
        for layer, rows in enumerate(layers):
            was = before[rank][layer]
            if len(rows) != len(was):
                assert (injected.kind, rank, layer) == ("append_twice", injected.rank, injected.layer)
                stop, start = chunks[fault.chunk].stop, chunks[fault.chunk].start
                assert np.array_equal(words(rows), words(torch.cat([was[:stop], was[start:]])))
                continue
            for chunk, at in enumerate(chunks):
                here, clean_rows = words(rows[at.start : at.stop]), words(was[at.start : at.stop])
                if fault.is_at(chunk, layer) and rank in injected.ranks and fault.kind in IN_PLACE:
                    assert np.array_equal(here, broken_block(fault, was, chunks))
                elif not (injected.changes_others and in_shadow(fault, run.plan, chunk, layer)) and not (
                    fault.is_at(chunk, layer) and fault.kind == "positions"
                ):
                    assert np.array_equal(here, clean_rows)


def one_at_random(random: Random, sessions: dict[tuple[int, str], Session]) -> str:
    setup = random_setup(random)
    session, ids = sessions[setup.world_size, setup.dtype], random_prompt(random)
    run = session.prefill(ids, paused=True, **setup.parameters)
    finish(run)
    before = snapshot(session, len(ids))
    if random.random() < 0.7:
        run.restart()
    injected = random_fault(random, run)
    run.inject(**injected.arguments)
    finish(run)
    strikes = run.faults[1].strikes
    assert [rank for rank, _, _ in strikes] == [injected.rank]
    assert strikes[0][1] > 0
    check(run, injected, before, snapshot(session, len(ids)))
    assert run.edited == []
    return f"{injected.kind} {injected.where}"


def at_random(model: Path, seed: int, count: int) -> set[str]:
    random, seen = Random(seed), set[str]()
    with ExitStack() as stack:
        sessions = {}
        for world_size in WORLD_SIZES:
            for dtype in DTYPES:
                made = stack.enter_context(session_on_threads(world_size, model))
                sessions[world_size, dtype] = made.load(str(model), dtype=dtype, threads=1)
        for _ in range(count):
            seen.add(one_at_random(random, sessions))
    return seen


def test_faults_drawn_at_random_break_what_is_expected_of_them(model: Path) -> None:
    assert len(at_random(model, seed=5, count=6)) > 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_faults_drawn_at_random_break_what_is_expected_of_them(model: Path, seed: int) -> None:
    assert len(at_random(model, seed=100 + seed, count=100)) >= 20  # of 29 kinds in places

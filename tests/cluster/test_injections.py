"""Faults on three real ranks: each is found and named exactly, and what changes is told while the run goes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import Tensor

from dinfer.run.failure import RankFailed
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.expected_tokens import expected
from tests.support.injections import random_prompt, random_setup
from tests.support.runs import wait_for
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt
from tests.unit.run.test_injections import broken, finish

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IDS, CHUNK, NEW = tuple(prompt(14)), 4, 3
DEADLINE_S = 60.0
WIRE: dict[str, Any] = {
    "rank": 2,
    "layer": 1,
    "chunk": 1,
    "tensor": "K",
    "head": 1,
    "token": 6,
    "where": "wire",
}
SENTENCE = "rank 2 received a changed K of block c1 l1 from rank 1: the block changed on the way or before it was sent"


def begun(session: Session, **parameters: Any) -> Run:
    """In a ring: layer 1 is computed on rank 0 and comes to rank 2 by way of rank 1."""
    given = {"chunk_size": CHUNK, "sync_strategy": "ring", "max_new_tokens": NEW, **parameters}
    return session.prefill(IDS, paused=True, **given)


def held(run: Run) -> list[list[Tensor]]:
    """The values themselves, by rank and layer."""
    source, shape = run.source(), run.plan.shape
    places = range(shape.tokens)
    return [
        [source.values(rank, layer, places) for layer in range(shape.layers)]
        for rank in range(shape.world_size)
    ]


def assert_clean(run: Run, checkpoint: Path) -> None:
    """It ends as if nothing had ever been broken."""
    finish(run)
    wanted = expected(checkpoint, IDS, CHUNK, NEW)
    assert run.sha256() == [wanted.kv_sha256] * 3
    assert run.kv().diff().equal
    assert run.compare("reference").equal
    assert list(run.decode(NEW).tokens) == wanted.tokens
    assert run.corrupt == []


# -- drawn at random


def drawn(session: Session, seeds: range) -> Counter[str]:
    """What the seeds drew; fails with all those that went wrong."""
    seen, wrong = Counter[str](), list[str]()
    for seed in seeds:
        random = Random(seed)
        parameters = random_setup(random, 7).parameters
        run = session.prefill(random_prompt(random, random.choice((4, 128))), paused=True, **parameters)
        try:
            seen[broken(run, random, held)] += 1
        except AssertionError as error:
            wrong.append(f"seed {seed}: {error}")
    print(f"\nseeds {seeds.start}–{seeds.stop - 1}: {len(wrong)} wrong; as it must be: {dict(seen)}")
    assert not wrong, "\n\n".join(wrong)
    return seen


def test_faults_are_found_and_named_exactly(session: Session) -> None:
    assert len(drawn(session, range(6))) > 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", range(3))
def test_sixty_faults_are_found_and_named_exactly(
    session: Session, model: Path, dtype: str, batch: int
) -> None:
    session.load(str(model), dtype=dtype, threads=1)
    try:
        first = 100 + 10 * batch + 30 * (dtype == "bfloat16")
        assert len(drawn(session, range(first, first + 10))) > 5
    finally:
        session.load(str(model), threads=1)


# -- what a diff moves


def test_a_diff_of_equal_caches_moves_under_a_twentieth_of_one(
    session: Session, model: Path, tmp_path: Path
) -> None:
    """At Qwen3-4B's KV shape: eight heads of 128, in bf16."""
    shape: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    session.load(str(tiny_checkpoint(tmp_path, layers=4, dtype="bfloat16", **shape)), threads=1)
    try:
        run = session.prefill(prompt(512), chunk_size=128)
        run.wait(DEADLINE_S)
        found = run.kv().diff()
        share = found.bytes_moved / (512 * 4 * run.source().subject.row_nbytes)
        print(f"\n{found.bytes_moved:,} bytes, {share:.3%} of one rank's cache")
        assert found.equal
        assert 0 < share < 0.05
    finally:
        session.load(str(model), threads=1)


# -- told while the run goes, and what follows then


def test_what_changed_is_told_while_the_run_goes(session: Session, model: Path) -> None:
    run = begun(session)
    run.inject("bitflip", **WIRE)
    run.run_to(chunk=1, layer=1)
    wait_for(lambda: [str(one) for one in run.corrupt] == [SENTENCE], "the news has come")
    assert run.standing().state == "paused"
    assert SENTENCE in str(run.where())
    finish(run)
    events = [event for event in run.trace.events if event.kind == "corrupt"]
    assert [(event.rank, event.chunk, event.layer, event.peer) for event in events] == [(2, 1, 1, 1)]
    run.faults.clear()
    assert not run.kv().diff().equal
    assert "what #1 changed stays changed" in str(run.where())
    run.restart()
    assert_clean(run, model)


def test_a_run_pauses_where_bytes_change_and_goes_on(session: Session) -> None:
    run = begun(session, on_corruption="pause")
    run.inject("bitflip", **WIRE)
    run.resume()
    wait_for(lambda: run.message == f"stopped: {SENTENCE}", "the news has come")
    run.wait(DEADLINE_S)
    assert run.standing().state == "paused"
    finish(run)
    found = run.kv().diff()
    assert [(one.rank, one.where) for one in found.differences] == [(2, "wire")]
    assert len(run.corrupt) == 1


def test_a_run_fails_where_bytes_change_and_is_clean_once_recovered(session: Session, model: Path) -> None:
    run = begun(session, on_corruption="fail")
    run.inject("bitflip", **WIRE)
    run.resume()
    with pytest.raises(RankFailed, match=r"rank 2 failed at `recv kv c1 l1 <- 1, 4 tokens`") as caught:
        run.wait(DEADLINE_S)
    assert SENTENCE in str(caught.value)
    session.recover()
    run.restart()
    run.faults.clear()
    assert_clean(run, model)

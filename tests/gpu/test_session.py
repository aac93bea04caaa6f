"""A session whose three ranks share one GPU: stepped, broken, hung, compared with a CPU and taken there.

Skipped where there is no CUDA device.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dinfer.cluster.threads import LocalRanks
from dinfer.engine import ops
from dinfer.model.decoder import Decoder
from dinfer.run.run import Run
from dinfer.saved.saved import open_saved
from dinfer.session.session import Session
from dinfer.verdict import waits
from tests.support.replays import arrive, check_same, engine_of
from tests.support.runs import wait_for
from tests.support.twin import prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
    pytest.mark.timeout(300),
]

IDS = prompt(22)
CLOSE = 1e-4
"""between values that a CPU and a GPU compute in float32, here without TF32, of a few layers"""


MODEL = {"layers": 6}
LOAD = {"gpu_ids": (0, 0, 0)}


@pytest.fixture(scope="module")
def on_cpu(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[int, ...]]:
    """The same run on a CPU, as a folder, and its new tokens."""
    with Session(LocalRanks(3)) as made:
        run = begin(made.load(str(model), threads=1))
        tokens = run.decode(4).tokens
        return run.save(tmp_path_factory.mktemp("saved") / "cpu"), tokens


def begin(session: Session, **parameters: Any) -> Run:
    return session.prefill(IDS, chunk_size=8, max_new_tokens=4, paused=True, **parameters)


def test_stepped_and_taken_back_it_ends_as_if_nothing_had_been(session: Session) -> None:
    straight = begin(session)
    tokens = straight.decode(4).tokens
    whole = engine_of(session, 0).cache
    assert whole
    sums = [whole.sha256(len(IDS) + 3)]
    run = begin(session)
    for unit, count in (("layer", 3), ("wave", 2), ("op", 5), ("chunk", 1)):
        run.step(unit, count)
        run.step_back(unit, 1)
    assert run.decode(4).tokens == tokens
    assert run.kv().diff().equal
    assert run.compare("reference").within_tolerance
    sums += [cache.sha256(len(IDS) + 3) for rank in range(3) if (cache := engine_of(session, rank).cache)]
    assert sums == sums[:1] * 4


def test_a_run_saved_on_a_cpu_differs_in_values_alone_and_by_little(
    session: Session, on_cpu: tuple[Path, tuple[int, ...]]
) -> None:
    folder, tokens = on_cpu
    run = begin(session)
    assert run.decode(4).tokens == tokens
    found = run.kv().diff(open_saved(folder), values=None)
    print(found)
    assert {one.kind for one in found.differences} <= {"value"}
    values = [one.values for one in found.differences if one.values]
    assert len(values) == len(found.differences)
    assert all(abs(one - other) < CLOSE for one, other in values)


def test_a_flipped_bit_is_named(session: Session) -> None:
    run = begin(session)
    run.inject("bitflip", rank=2, layer=1, chunk=1, tensor="V", head=1, token=9, dim=3, where="memory")
    run.resume()
    run.wait(60)
    first = run.kv().diff().first
    assert first
    assert (first.rank, first.layer, first.chunk, first.tensor, first.head, first.token, first.dim) == (
        *(2, 1, 1, "V", 1, 9, 3),
    )


def test_a_rank_that_stands_still_is_named_and_freed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "STUCK_S", 2.0)
    door, unbroken = threading.Event(), ops.HANDLERS["layer"]

    def stuck(state: Any, op: Any, comm: Any) -> Any:
        if (state.rank, op.chunk, op.layer) == (1, 1, 3):
            door.wait()
        return unbroken(state, op, comm)

    monkeypatch.setitem(ops.HANDLERS, "layer", stuck)
    run = begin(session)
    run.resume()
    try:
        wait_for(lambda: run.hang, "a verdict")
        verdict = run.verdict()
    finally:
        door.set()
    print(verdict)
    assert (verdict.kind, verdict.rank) == ("stuck in Python", 1)
    assert "door.wait()" in verdict.sentence
    wait_for(lambda: run.standing().state == "done", "it goes on")
    assert run.kv().diff().equal


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_is_replayed_on_the_gpu_bit_for_bit_and_elsewhere_says_so(
    session: Session, model: Path, tmp_path: Path, rank: int
) -> None:
    run = begin(session)
    run.decode(4)
    saved = open_saved(run.save(tmp_path / "saved"))
    for kept in (run, saved):
        with kept.replay(rank, decoder=Decoder.load(model, device="cuda:0")) as replay:
            arrive(replay)
            check_same(replay, engine_of(session, rank), run.tokens)
    with saved.replay(rank, device="cpu") as elsewhere:
        arrive(elsewhere)
        print(elsewhere.notes)
        assert elsewhere.tokens == run.tokens
        own = [elsewhere.kv(layer) for layer in (2 * rank, 2 * rank + 1)]
        theirs = [engine_of(session, rank).kv(layer) for layer in (2 * rank, 2 * rank + 1)]
        same = all(torch.equal(a.k, b.k.cpu()) for a, b in zip(own, theirs, strict=True))
        assert same or any("has other bytes here" in note for note in elsewhere.notes)

"""Ranks that are threads and share a GPU, their messages copied within it: the KV and tokens of lanes that go through
the host, bit for bit; walks, and a fault on the wire. Skipped where there is no CUDA device."""

from __future__ import annotations

import gc
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from dinfer.plan.cut import UNITS
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.threads import session_on_threads
from tests.support.twin import prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
    pytest.mark.timeout(300),
]
MODEL = {"layers": 6}
LOAD = {"gpu_ids": (0, 0, 0), "backend": "ipc"}
IDS = prompt(60)
Held = tuple[tuple[str, ...], tuple[int, ...]]


def begun(session: Session, kernels: str, **parameters: Any) -> Run:
    return session.prefill(IDS, chunk_size=8, max_new_tokens=4, paused=True, kernels=kernels, **parameters)


def held(run: Run) -> Held:
    tokens = run.decode(4).tokens
    return tuple(run.sha256()), tokens


@pytest.fixture(scope="module")
def through_the_host(model: Path) -> dict[str, Held]:
    """By kernels, what ranks hold whose lanes copy blocks one by one."""
    with session_on_threads(3, model, gpu_ids=(0, 0, 0), backend="gloo") as session:
        return {kernels: held(begun(session, kernels)) for kernels in ("exact", "graph")}


@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
@pytest.mark.parametrize("kernels", ["exact", "graph"])
def test_the_same_as_through_the_host(
    session: Session, through_the_host: dict[str, Held], kernels: str, strategy: str, schedule: str
) -> None:
    assert "backend ipc" in str(session)
    run = begun(session, kernels, sync_strategy=strategy, schedule=schedule)
    assert held(run) == through_the_host[kernels]
    assert run.kv().diff().equal


@pytest.mark.parametrize("seed", range(3))
def test_a_walk_back_and_forth_ends_as_if_nothing_had_been(
    session: Session, through_the_host: dict[str, Held], seed: int
) -> None:
    run, random = begun(session, "graph"), Random(seed)
    for _ in range(30):
        unit = random.choice(UNITS)
        random.choice((run.step, run.step, run.step_back))(unit, random.randint(1, 3))
    assert held(run) == through_the_host["graph"]


def test_a_bit_that_flips_on_the_wire_is_located(session: Session) -> None:
    run = begun(session, "graph")
    run.inject("bitflip", rank=2, layer=1, chunk=3, tensor="K", head=1, token=25, dim=3, where="wire")
    run.resume()
    run.wait(60)
    first = run.kv().diff().first
    assert first
    assert (first.rank, first.layer, first.chunk, first.tensor, first.where) == (2, 1, 3, "K", "wire")


def test_many_runs_keep_no_memory(session: Session) -> None:
    used = []
    for _ in range(30):
        run = begun(session, "graph")
        run.decode(4)
        torch.cuda.synchronize()
        gc.collect()  # of the runs before
        used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[9]

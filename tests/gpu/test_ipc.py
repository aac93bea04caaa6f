"""Processes that share one GPU, their messages copied within it: the same KV and tokens as over gloo, bit for bit;
stops, faults on the wire, a rank that is killed. Skipped where there is no CUDA device."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dinfer
from dinfer.run.failure import RankFailed
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.cluster.test_recovery import pid_of
from tests.gpu.test_nccl import check_a_walk_back_and_forth, kv_and_tokens
from tests.gpu.test_one_card import _run
from tests.support.runs import wait_for
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
    pytest.mark.timeout(300),
]
SMALL = {
    "prompt_ids": ",".join(map(str, prompt(22))),
    "chunk_size": 4,
    "max_new_tokens": 6,
    "gpu_ids": "0,0,0",
    "kernels": "exact",
    "backend": "ipc",
}
LAYERS = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen3", "qwen3", layers=LAYERS)


@pytest.fixture(scope="module")
def over_gloo(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(tmp_path_factory.mktemp("over"), model=tiny, **{**SMALL, "backend": "gloo"})


@pytest.mark.parametrize(
    ("schedule", "strategy"), [("pipelined", "pairwise"), ("pipelined", "ring"), ("lockstep", "pairwise")]
)
def test_three_ranks(
    tiny: Path, over_gloo: dict[str, Any], tmp_path: Path, schedule: str, strategy: str
) -> None:
    result = _run(tmp_path, model=tiny, schedule=schedule, sync_strategy=strategy, **SMALL)
    assert result["backend"] == "ipc"
    found = kv_and_tokens(result["ranks"]) + kv_and_tokens(over_gloo["ranks"])
    assert found == found[:1] * 6


@pytest.mark.parametrize("kernels", ["graph", "compiled"])
def test_graphs_give_the_same_over_gloo(tiny: Path, tmp_path: Path, kernels: str) -> None:
    """Lanes on threads launch the same graphs as streams do, and each process compiles the same kernels."""
    flags = {**SMALL, "kernels": kernels}
    results = [_run(tmp_path / one, model=tiny, **{**flags, "backend": one}) for one in ("ipc", "gloo")]
    found = [rank for result in results for rank in result["ranks"]]
    assert {rank["kernels"] for rank in found} == {kernels}
    assert kv_and_tokens(found) == kv_and_tokens(found[:1]) * 6


def test_a_walk_back_and_forth_ends_as_if_nothing_had_been(
    tiny: Path, over_gloo: dict[str, Any], tmp_path: Path
) -> None:
    ranks = {"world_size": 3, "gpu_ids": (0, 0, 0), "kernels": "exact"}
    check_a_walk_back_and_forth(tiny, over_gloo, tmp_path, backend="ipc", **ranks)


@pytest.fixture(scope="module")
def session(tiny: Path) -> Iterator[Session]:
    with dinfer.connect(3, start=True) as made:
        made.load(str(tiny), gpu_ids=(0, 0, 0), kernels="graph", backend="ipc")
        assert "backend ipc" in str(made)
        yield made


def begin(session: Session, **parameters: Any) -> Run:
    return session.prefill(prompt(22), paused=True, chunk_size=4, max_new_tokens=4, **parameters)


def test_a_bit_that_flips_on_the_wire_is_located(session: Session) -> None:
    run = begin(session)
    run.inject("bitflip", rank=2, layer=1, chunk=3, tensor="K", head=1, token=13, dim=3, where="wire")
    run.resume()
    run.wait(60)
    first = run.kv().diff().first
    assert first
    assert (
        first.rank,
        first.layer,
        first.chunk,
        first.tensor,
        first.head,
        first.token,
        first.dim,
        first.where,
    ) == (*(2, 1, 3, "K", 1, 13, 3, "wire"),)


def test_a_rank_that_is_stopped_holds_its_peers_and_nothing_is_lost(session: Session) -> None:
    whole = begin(session)
    tokens = whole.decode(4).tokens
    run = begin(session)
    run.step("chunk")
    pid = pid_of(session, 1)
    os.kill(pid, signal.SIGSTOP)
    try:  # streams are asked how far they have been issued before a run goes on
        with pytest.raises(RankFailed, match="rank 1 does not answer: its process is stopped"):
            run.resume()
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not session.ranks.silent(), "it answers again")
    assert run.decode(4).tokens == tokens
    assert run.kv().diff().equal


def test_a_rank_that_is_killed_is_named_and_the_next_run_is_right(session: Session) -> None:
    tokens = begin(session).decode(4).tokens
    run = begin(session)
    run.step("chunk")
    os.kill(pid_of(session, 1), signal.SIGKILL)
    with pytest.raises(RankFailed, match="rank 1 is gone"):
        run.resume()
    print(session.recover())
    again = begin(session)
    assert again.decode(4).tokens == tokens
    assert again.kv().diff().equal

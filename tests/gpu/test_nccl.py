"""Ranks with a GPU each, on NCCL: the same KV and tokens as over gloo, bit for bit, and stops like any other's.

Skipped where there are too few CUDA devices.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from tests.cluster.test_stepping import act
from tests.gpu.test_one_card import NEW, TOKENS, _run, four_billion
from tests.support.stepped import stepped
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

__all__ = ["four_billion"]  # the fixture

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 1, reason="there is no CUDA device on this machine"),
    pytest.mark.timeout(600),
]
SMALL = {"prompt_ids": ",".join(map(str, prompt(22))), "chunk_size": 4, "max_new_tokens": 6}
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"NCCL between ranks takes two CUDA devices; here: {GPUS}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen3", "qwen3")


def ran(folder: Path, model: Path, backend: str, gpu_ids: str, **flags: object) -> dict[str, Any]:
    """The result of a run with a GPU for each rank; `auto` must choose NCCL."""
    result = _run(
        folder / backend,
        model=model,
        backend=backend,
        gpu_ids=gpu_ids,
        world_size=len(gpu_ids.split(",")),
        **flags,
    )
    assert result["backend"] == ("gloo" if backend == "gloo" else "nccl")
    return result


def kv_and_tokens(ranks: list[dict[str, Any]]) -> list[tuple[str, list[int]]]:
    return [(rank["kv_sha256"], rank["tokens"]) for rank in ranks]


def assert_same(result: dict[str, Any], other: dict[str, Any]) -> None:
    """All ranks of both hold the same KV and have chosen the same tokens."""
    found = kv_and_tokens(result["ranks"]) + kv_and_tokens(other["ranks"])
    assert found == found[:1] * len(found)


def check_a_walk_back_and_forth(
    model: Path, over_gloo: dict[str, Any], folder: Path, *, backend: str, **config: object
) -> None:
    """Forty steps and backs, and on to the end: the KV and tokens of the run over gloo."""
    config |= {"chunk_size": 4, "max_new_tokens": 6, "backend": backend}
    with stepped(model, prompt(22), folder / "logs", **config) as run:
        assert run.job.config.backend == backend
        random = Random(5)
        for _ in range(40):
            act(run, random)
            run.assert_stands()
        run.stepper.resume()
        run.stepper.wait(60)
        results = run.decode()
    assert kv_and_tokens(results) == kv_and_tokens(over_gloo["ranks"])


@pytest.fixture(scope="module")
def over_gloo(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of two ranks that NCCL is compared with."""
    return ran(tmp_path_factory.mktemp("over"), tiny, "gloo", "0,1", **SMALL)


def test_one_rank(tiny: Path, tmp_path: Path) -> None:
    assert_same(*(ran(tmp_path, tiny, backend, "0", **SMALL) for backend in ("auto", "gloo")))


@two_gpus
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
def test_two_ranks(tiny: Path, over_gloo: dict[str, Any], tmp_path: Path, schedule: str) -> None:
    result = ran(tmp_path, tiny, "auto", "0,1", schedule=schedule, **SMALL)
    assert_same(result, over_gloo)
    assert [rank["device"] for rank in result["ranks"]] == ["cuda:0", "cuda:1"]


@two_gpus
def test_a_walk_back_and_forth_ends_as_if_nothing_had_been(
    tiny: Path, over_gloo: dict[str, Any], tmp_path: Path
) -> None:
    check_a_walk_back_and_forth(tiny, over_gloo, tmp_path, world_size=2, gpu_ids=(0, 1), backend="nccl")


@two_gpus
def test_two_ranks_of_four_billion(four_billion: Path, tmp_path: Path) -> None:
    ids = [(i * i * 7 + i * 13 + 5) % 151936 for i in range(TOKENS)]
    settings = {"chunk_size": 128, "max_new_tokens": NEW, "threads": 4, "start_timeout": 300, "timeout": 120}
    flags = {"prompt_ids": ",".join(map(str, ids)), **settings}
    results = [ran(tmp_path, four_billion, backend, "0,1", **flags) for backend in ("nccl", "gloo")]
    for result in results:
        print(result["backend"], "prefill s:", [round(rank["prefill_s"], 3) for rank in result["ranks"]])
    assert_same(*results)

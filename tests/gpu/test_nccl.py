"""Ranks with a GPU each, on NCCL: the same KV and tokens as over gloo, bit for bit, and stops like any other's.

Skipped where there are too few CUDA devices.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from tests.cluster.stepped import stepped
from tests.cluster.test_stepping import act
from tests.gpu.test_one_card import NEW, TOKENS, _run, four_billion
from tests.unit.engine.twin import prompt
from tests.unit.model.tiny import tiny_checkpoint

__all__ = ["four_billion"]  # the fixture

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 1, reason="there is no CUDA device on this machine"),
    pytest.mark.timeout(600),
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"NCCL between ranks takes two CUDA devices; here: {GPUS}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen3", "qwen3")


def on_both(folder: Path, model: Path, ids: list[int], gpu_ids: str, **flags: object) -> list[dict[str, Any]]:
    """The results over the backend that is chosen, which must be NCCL, and over gloo."""
    given = {"model": model, "prompt_ids": ",".join(map(str, ids)), "gpu_ids": gpu_ids, **flags}
    world_size = len(gpu_ids.split(","))
    results = [
        _run(folder / backend, backend=backend, world_size=world_size, **given)
        for backend in ("auto", "gloo")
    ]
    assert [result["backend"] for result in results] == ["nccl", "gloo"]
    return results


def assert_same(results: list[dict[str, Any]]) -> None:
    ranks = [rank for result in results for rank in result["ranks"]]
    assert len({rank["kv_sha256"] for rank in ranks}) == 1
    assert all(rank["tokens"] == results[0]["tokens"] for rank in ranks)


def test_one_rank(tiny: Path, tmp_path: Path) -> None:
    assert_same(on_both(tmp_path, tiny, list(prompt(22)), "0", chunk_size=4, max_new_tokens=6))


@two_gpus
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
def test_two_ranks(tiny: Path, tmp_path: Path, schedule: str) -> None:
    results = on_both(
        tmp_path, tiny, list(prompt(22)), "0,1", chunk_size=4, max_new_tokens=6, schedule=schedule
    )
    assert_same(results)
    assert [rank["device"] for rank in results[0]["ranks"]] == ["cuda:0", "cuda:1"]


@two_gpus
def test_a_walk_back_and_forth_ends_as_if_nothing_had_been(tiny: Path, tmp_path: Path) -> None:
    config = {"world_size": 2, "gpu_ids": (0, 1), "chunk_size": 4, "max_new_tokens": 6}
    wanted = on_both(tmp_path, tiny, list(prompt(22)), "0,1", chunk_size=4, max_new_tokens=6)[0]["ranks"]
    with stepped(tiny, prompt(22), tmp_path / "logs", **config) as run:
        random = Random(5)
        for _ in range(40):
            act(run, random)
            run.assert_stands()
        run.stepper.resume()
        run.stepper.wait(60)
        results = run.decode()
    assert [result["kv_sha256"] for result in results] == [rank["kv_sha256"] for rank in wanted]
    assert [result["tokens"] for result in results] == [rank["tokens"] for rank in wanted]


@two_gpus
def test_two_ranks_of_four_billion(four_billion: Path, tmp_path: Path) -> None:
    ids = [(i * i * 7 + i * 13 + 5) % 151936 for i in range(TOKENS)]
    settings = {"chunk_size": 128, "max_new_tokens": NEW, "threads": 4, "start_timeout": 300, "timeout": 120}
    results = on_both(tmp_path, four_billion, ids, "0,1", **settings)
    assert_same(results)
    for result in results:
        print(result["backend"], "prefill s:", [round(rank["prefill_s"], 3) for rank in result["ranks"]])

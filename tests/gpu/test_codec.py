"""Ranks that share one GPU, KV encoded on its way: all hold the same bytes, with each kind of kernels.

Skipped where there is no CUDA device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_nccl import kv_and_tokens
from tests.gpu.test_one_card import _run
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
    pytest.mark.timeout(300),
]
FLAGS: dict[str, Any] = {
    "prompt_ids": ",".join(map(str, prompt(22))),
    "chunk_size": 4,
    "max_new_tokens": 6,
    "gpu_ids": "0,0,0",
    "backend": "gloo",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen3", "qwen3", layers=6)


@pytest.mark.parametrize("codec", ["bf16", "k=int8,v=fp8", "int4"])
@pytest.mark.parametrize("kernels", ["exact", "graph"])
def test_ranks_hold_the_same(tiny: Path, tmp_path: Path, kernels: str, codec: str) -> None:
    flags = {**FLAGS, "model": tiny, "kernels": kernels, "codec": codec}
    results = [
        _run(tmp_path / one, **flags, sync_strategy=one)  # a ring sends on what it has received
        for one in ("pairwise", "ring")
    ]
    found = [rank for result in results for rank in result["ranks"]]
    assert {rank["kernels"] for rank in found} == {kernels}
    assert kv_and_tokens(found) == kv_and_tokens(found[:1]) * 6

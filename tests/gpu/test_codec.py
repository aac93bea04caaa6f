"""KV that is encoded on its way between ranks that share a GPU: all hold the same bytes, with each kind of kernels.

Skipped where there is no CUDA device.
"""

from __future__ import annotations

import pytest
import torch

from dinfer.session.session import Session
from dinfer.severity import Severity
from tests.support.twin import prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
    pytest.mark.timeout(300),
]
MODEL = {"layers": 6}
LOAD = {"gpu_ids": (0, 0, 0), "backend": "gloo"}  # streams send blocks as they are


@pytest.mark.parametrize("codec", ["bf16", "k=int8,v=fp8", "int4"])
@pytest.mark.parametrize("kernels", ["exact", "graph"])
def test_ranks_hold_the_same(session: Session, kernels: str, codec: str) -> None:
    held = []
    for strategy in ("pairwise", "ring"):  # a ring sends on what it has received
        run = session.prefill(
            prompt(22),
            chunk_size=8,
            max_new_tokens=4,
            kernels=kernels,
            codec=codec,
            sync_strategy=strategy,
            paused=True,
        )
        run.step("layer", 3)
        run.step_back("layer", 2)
        run.resume()
        assert run.wait(60).state == "done"
        held += run.sha256()
        run.decode()
        assert run.kv().diff().equal
        assert run.compare("reference").severity == Severity.NOTE
    assert len(set(held)) == 1

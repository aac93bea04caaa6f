"""From a wrong answer to its block where ranks share one GPU: bisect, graft, and back.

Skipped where there is no CUDA device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dinfer
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.twin import prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
    pytest.mark.timeout(300),
]
MODEL = {"layers": 6}
LOAD = {"gpu_ids": (0, 0, 0)}


def ended(session: Session, kernels: str, *faults: dict[str, Any]) -> Run:
    run = session.prefill(prompt(22), paused=True, chunk_size=8, max_new_tokens=4, kernels=kernels)
    for fault in faults:
        run.inject("bitflip", **fault)
    run.resume()
    assert run.wait(60.0).state == "done"
    return run


@pytest.mark.parametrize("kernels", ["exact", "graph"])
def test_from_a_wrong_bit_to_its_block_and_back(session: Session, tmp_path: Path, kernels: str) -> None:
    run = ended(session, kernels)
    tokens = run.decode(4).tokens
    right = dinfer.open(run.save(tmp_path / "right"))
    flip = {"rank": 2, "layer": 3, "chunk": 1, "tensor": "V", "bit": 29}
    run = ended(session, kernels, flip)
    wrong = run.sha256()
    answer = run.bisect(right)
    print(answer)
    assert (answer.part, answer.chunk, answer.layer, answer.rank) == ("V", 1, 3, 2)
    assert run.sha256() == wrong
    run.graft(layer=3, chunk=1, source=right)
    assert len(set(run.sha256())) == 1
    assert run.decode(4).tokens == tokens

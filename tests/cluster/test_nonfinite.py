"""NaN and Inf on real ranks: told by a session at once, and by `dinfer run` on the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dinfer.session.session import Session
from tests.support.fixtures import Start
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

IDS = tuple(prompt(12))
DEADLINE_S = 60.0


def test_a_nan_that_all_ranks_compute_alike_is_told_when_the_run_stands(session: Session) -> None:
    run = session.prefill(IDS, paused=True, chunk_size=4, max_new_tokens=3)
    run.inject("nan", where="compute", layer=1, chunk=1, token=6)
    run.resume()
    where = str(run.wait(DEADLINE_S))
    first = "first NaN in K of c1 l1, token 6, computed by rank 0"
    assert where.startswith("done")
    assert f"not finite: {first}; " in where
    found = run.kv().diff()
    assert found.equal
    assert f"hold NaN or Inf: {first}" in found.verdict


def test_dinfer_run_warns_of_a_weight_that_overflows(start: Start, tmp_path: Path) -> None:
    """It reaches the logits, so the run fails; the warning says where it came from."""
    model = tiny_checkpoint(tmp_path / "model", layers=4)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][5, 3] = 3e38
    weights["model.layers.1.input_layernorm.weight"][3] = 1e3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run = start(model, prompt_ids=IDS, chunk_size=4, max_new_tokens=3)
    assert run.finish() == 1
    assert "warning: not finite: first Inf in V of c0 l1, token 0, computed by rank 0; " in run.out
    assert "The first NaN or Inf is in layer 1, chunk 0 (token 0)" in run.err

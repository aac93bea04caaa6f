"""Layers as CUDA graphs: families, ranks on one card, steps and backs, conditions, memory. Skipped without CUDA."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dinfer.config import Config
from dinfer.engine.engine import Engine
from dinfer.engine.kernels import Kernels
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.kernels.attend import attend, keep
from dinfer.model.kernels.table import Kept, LayerTable
from dinfer.plan.breakpoints import Breakpoint
from dinfer.transport.nccl import NcclComm
from tests.support.graph_runs import CHUNK, IDS, NEW, check_a_run, check_a_walk
from tests.support.tiny import CONFIGS, tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
    pytest.mark.timeout(600),
]

UNCAPTURED = {"qwen3_moe"}  # its experts are chosen on the host


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder.load(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), layers=6), device="cuda")


@pytest.fixture(scope="module")
def comm() -> NcclComm:
    return NcclComm(0, 1, torch.distributed.HashStore(), 60)  # type: ignore[attr-defined]


@contextmanager
def engine_of(decoder: Decoder, comm: NcclComm, **config: Any) -> Iterator[Engine]:
    """An engine of one rank whose ops are issued to CUDA streams."""
    given = {"world_size": 1, "gpu_ids": (0,), "backend": "nccl", "chunk_size": CHUNK, "max_new_tokens": NEW}
    settings = Config.of({**given, **config})
    engine = Engine(decoder, comm, settings, graphs=Kernels().prepare(decoder, settings))
    try:
        yield engine
    finally:
        assert engine.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "tokens", "valid", "position", "window", "cap"),
    [
        (32, 8, 128, 128, 128, 2048, 0, 0.0),
        (32, 8, 128, 1, 1, 3000, 0, 0.0),
        (32, 8, 128, 128, 77, 100, 0, 0.0),
        (8, 4, 256, 100, 100, 700, 512, 0.0),
        (6, 2, 24, 40, 33, 100, 32, 0.0),
        (14, 2, 64, 1, 1, 9, 4, 20.0),
        (4, 4, 16, 70, 70, 3, 0, 30.0),
    ],
)
def test_the_kernels_do_what_torch_does(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    tokens: int,
    valid: int,
    position: int,
    window: int,
    cap: float,
) -> None:
    q, k, v = (torch.randn(1, count, tokens, dim).to(dtype) for count in (heads, kv_heads, kv_heads))
    before, hidden = (
        torch.randn(position + tokens, 2, kv_heads, dim).to(dtype),
        torch.randn(1, tokens, 64).to(dtype),
    )
    found = []
    for device in ("cpu", "cuda"):
        cache = KVCache(2, position + tokens, kv_heads, dim, dtype, device)
        cache.tensor(1).copy_(before)
        kept = Kept.of(cache, 4, digests=True, largest=torch.zeros((2, cache.capacity, 3), device=device))
        table = LayerTable(2, torch.device(device))
        table.bind(cache, kept)
        table.go_to(position, 2, valid)
        given = (q.to(device), k.to(device), v.to(device), table.rows[1])
        made = attend(*given, dim**-0.5, window, cap)
        out = torch.zeros_like(hidden, device=device)
        keep(hidden.to(device), out, table.rows[1])
        found.append(
            [
                one.cpu()
                for one in (made[:, :valid], cache.tensor(1), out[:, :valid], *kept)
                if one is not None
            ]
        )
    (mine, *kept_on_cpu), (theirs, *kept_on_cuda) = found
    torch.testing.assert_close(theirs, mine, rtol=0.02, atol=0.02 if dtype is not torch.float32 else 1e-5)
    assert all(torch.equal(one, other) for one, other in zip(kept_on_cpu, kept_on_cuda, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(set(CONFIGS) - UNCAPTURED))
def test_each_family_computes_what_transformers_does(tmp_path: Path, family: str, dtype: str) -> None:
    window: dict[str, Any] = {"sliding_window": 8} if family in {"gemma2", "gemma3_text", "mistral"} else {}
    decoder = Decoder.load(tiny_checkpoint(tmp_path, family, layers=4, dtype=dtype, **window), device="cuda")
    check_a_run(decoder, world_size=1)


def test_what_cannot_be_captured_runs_exactly_and_says_so_once(
    tmp_path: Path, comm: NcclComm, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = Decoder.load(tiny_checkpoint(tmp_path, "qwen3_moe", layers=2), device="cuda")
    kernels, config = Kernels(), Config(world_size=1, gpu_ids=(0,), chunk_size=CHUNK, kernels="graph")
    with caplog.at_level("WARNING", "dinfer"):
        graphs = [kernels.prepare(decoder, config) for _ in range(2)]
    told = [
        record.message for record in caplog.records if "kernels=graph cannot run qwen3_moe" in record.message
    ]
    assert len(told) == (1 if graphs[0] is None else 0)
    with engine_of(decoder, comm, kernels="auto") as engine:
        engine.prefill_phase(IDS)
        assert len(engine.decode_phase()) == NEW


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_three_ranks_on_one_card_hold_the_same(decoder: Decoder, strategy: str) -> None:
    check_a_run(decoder, world_size=3, sync_strategy=strategy)


@pytest.mark.parametrize("seed", range(3))
def test_a_walk_ends_as_a_run_without_it(decoder: Decoder, seed: int) -> None:
    check_a_walk(decoder, seed, world_size=2)


@pytest.mark.filterwarnings("default")  # of torch's compiler
@pytest.mark.parametrize("kernels", ["graph", "compiled"])
def test_on_streams_compiled_or_not(decoder: Decoder, comm: NcclComm, kernels: str) -> None:
    with engine_of(decoder, comm, kernels="exact") as engine:
        engine.prefill_phase(IDS)
        wanted, tokens = engine.kv(5).k.clone(), engine.decode_phase()
    with engine_of(decoder, comm, kernels=kernels) as engine:
        assert engine.graphs
        for _ in range(3):
            engine.prefill_phase(IDS)
            torch.testing.assert_close(engine.kv(5).k, wanted, rtol=1e-3, atol=1e-3)
            engine.recheck()
            assert engine.decode_phase() == tokens


def test_a_condition_stops_at_its_very_op(decoder: Decoder, comm: NcclComm) -> None:
    with engine_of(decoder, comm, kernels="graph") as engine:
        hits: list[str] = []
        engine._on_hit = lambda _one, op, _found: hits.append(str(op)) if engine.prompt.halt() else None
        executor = engine.prepare(IDS)
        engine.prompt.conditions.arm([Breakpoint(1, layer=2, chunk=1, condition="absmax", bound=0.0)])
        engine.prompt.go((tuple(len(lane.ops) for lane in engine.prompt.plan.lanes[0]),))
        assert executor.wait(lambda: bool(hits) and executor.stand().at_limits, 60)
        assert hits == ["layer c1 l2"]
        position = executor.stand().positions[0]
        assert str(engine.prompt.plan.lanes[0][0].ops[position - 1]) == "layer c1 l2"


def test_two_hundred_runs_do_not_grow(decoder: Decoder, comm: NcclComm) -> None:
    with engine_of(decoder, comm, kernels="graph") as engine:
        used = []
        for number in range(200):
            engine.prefill_phase(IDS)
            engine.decode_phase()
            if number in (20, 199):
                gc.collect()  # prompt and lanes know each other
                torch.cuda.synchronize()
                used.append((torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]))
        (before, free), (after, left) = used
        assert after == before
        assert free - left <= 16 << 20  # what torch and the driver hold in pages of their own

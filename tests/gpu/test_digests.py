"""Digests on a GPU: those of the CPU, at no wait for the device in the forward. Skipped where there is no CUDA device.

`-s` prints what they cost in prefill, on and off in turn.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median
from time import perf_counter

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from dinfer.config import Config
from dinfer.engine.corruption import Alarm, Corruption
from dinfer.engine.engine import Engine
from dinfer.engine.finite import FiniteCheck
from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.model.decoder import Decoder
from dinfer.plan.ops import Op
from dinfer.transport.gate import Gate
from dinfer.transport.in_process import Exchange
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import Twin, prompt, twin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
    pytest.mark.timeout(600),
]

IDS = list(prompt(40))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder.load(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), layers=6), device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [3, 8, 128])
def test_equal_bytes_have_equal_digests_on_cpu_and_gpu(dtype: torch.dtype, head_dim: int) -> None:
    shape = (16, 2, 4, head_dim * dtype.itemsize)
    drawn = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    block = drawn.view(dtype)
    rows = row_digests(block)
    assert torch.equal(row_digests(drawn.cuda().view(dtype)).cpu(), rows)
    assert as_numbers(block_digests(rows.cuda())) == as_numbers(block_digests(rows))


def _flip(block: Tensor) -> None:
    block.data[0, 1, 0].view(torch.int32)[0] ^= 1


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
@pytest.mark.parametrize("rendezvous", [True, False])
def test_nothing_is_named_but_what_changes(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, strategy: str, *, rendezvous: bool
) -> None:
    with twin(decoder, world_size=3, chunk_size=8, sync_strategy=strategy, rendezvous=rendezvous) as made:
        found: list[Corruption] = []
        for engine in made.engines:
            engine._alarm = Alarm("record", found.append)
        for _ in range(10):
            made.all(lambda engine: engine.prefill_phase(IDS))
            made.all(lambda engine: engine.recheck())
        assert found == []
        for engine in made.engines:
            engine.prepare(IDS)

        def on_wire(op: Op, block: Tensor) -> None:
            if (op.chunk, op.layer) == (2, 1):
                _flip(block)

        monkeypatch.setattr(made.engines[1].executor.state.faults, "on_wire", on_wire)
        made.all(lambda engine: engine.prefill_phase())
        first = [one for one in found if one.first is None]
        assert [(one.rank, one.chunk, one.layer, one.tensors) for one in first] == [(1, 2, 1, "V")]
        found.clear()
        _flip(made.engines[2].executor.state.block(4, 5))
        made.all(lambda engine: engine.recheck())
        assert [(one.rank, one.tensors, one.token, one.head) for one in found] == [(2, "V", 32, 0)]


def _alone(decoder: Decoder, *, digests: bool) -> Engine:
    """One rank by itself: all that it does is the forward."""
    config = Config(world_size=1, chunk_size=8, digests=digests)
    return Engine(decoder, Exchange(1, Gate()).comm(0), config)


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing looks for NaN and Inf: its thread makes calls of its own, now more, now fewer."""
    monkeypatch.setattr(FiniteCheck, "made", lambda *_: None)


def _calls(run: Twin | Engine) -> Counter[str]:
    """The CUDA calls of one prefill."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        if isinstance(run, Twin):
            run.all(lambda engine: engine.prefill_phase(IDS))
        else:
            run.prefill_phase(IDS)
        torch.cuda.synchronize()
    rows = [row for row in profiled.key_averages() if row.key.startswith("cu")]
    print()
    for row in sorted(rows, key=lambda row: -row.count):
        print(f"{row.key:<32}{row.count:>8} calls{row.self_cpu_time_total / 1e3:>12.3f} ms")
    return Counter({row.key: row.count for row in rows})


def _launches(counts: Counter[str]) -> int:
    """How many kernels, by whichever of CUDA's calls."""
    return sum(count for name, count in counts.items() if "LaunchKernel" in name)


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@pytest.mark.usefixtures("blind")
@pytest.mark.filterwarnings("ignore:.*Profiler clears events.*")
def test_digests_add_no_synchronisation_to_the_forward(decoder: Decoder) -> None:
    counts = {}
    for digests in (False, True):
        engine = _alone(decoder, digests=digests)
        try:
            _calls(engine)  # the first prefill allocates
            counts[digests] = _calls(engine)
            assert len(engine.executor.state.ledger.entries) == (30 if digests else 0)
        finally:
            assert engine.release()
    assert _launches(counts[True]) > _launches(counts[False])
    assert counts[True]["cudaDeviceSynchronize"] >= 1, "the profile does not see a wait that is there"
    assert {name: counts[True][name] for name in WAITS} == {name: counts[False][name] for name in WAITS}


@pytest.mark.usefixtures("blind")
@pytest.mark.filterwarnings("ignore:.*Profiler clears events.*")
def test_only_transfers_of_blocks_wait_and_for_their_own_stream(decoder: Decoder) -> None:
    """One wait for a stream of its own where a block is sent by who computed it, and one where a block is received."""
    counts = {}
    for digests in (False, True):
        with twin(decoder, world_size=3, chunk_size=8, digests=digests) as made:
            _calls(made)
            counts[digests] = _calls(made)
            ops = [op for lanes in made.engines[0].executor.plan.lanes for lane in lanes for op in lane.ops]
    moved = sum(op.what == "kv" and op.is_transfer for op in ops)
    more = {name: counts[True][name] - counts[False][name] for name in WAITS}
    assert more["cudaDeviceSynchronize"] == more["cudaEventSynchronize"] == 0
    assert 0 < more["cudaStreamSynchronize"] <= moved


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-4B's shape with few layers."""
    config = Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=6, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=1024, max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_cost_is_printed(wide: Path) -> None:
    """Three ranks on threads of one process, which share the card and the interpreter: the worst case for launches."""
    decoder, ids = Decoder.load(wide, "bfloat16", "cuda"), list(prompt(1024, vocab=1000))
    took: dict[bool, list[float]] = {True: [], False: []}
    checks = []
    for number in range(9):
        for digests in (True, False):
            with twin(decoder, world_size=3, chunk_size=128, digests=digests) as made:
                torch.cuda.synchronize()
                began = perf_counter()
                made.all(lambda engine: engine.prefill_phase(ids))
                torch.cuda.synchronize()
                took[digests] += [perf_counter() - began] if number > 1 else []
                made.all(lambda engine: engine.recheck())
                if digests and number > 1:
                    checks.append(max(engine.check_s for engine in made.engines))
    on, off = median(took[True]), median(took[False])
    print(f"\nprefill of 1,024 tokens by 128, 6 layers of Qwen3-4B's shape in bf16, 3 ranks on one card: "
          f"{on * 1e3:.1f} ms with digests, {off * 1e3:.1f} ms without ({on / off - 1:+.1%}); "
          f"the check before decode {median(checks) * 1e3:.1f} ms")  # fmt: skip
    assert len(took[True]) == len(took[False]) == 7

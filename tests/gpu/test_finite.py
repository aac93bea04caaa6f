"""NaN and Inf on a GPU: found as on a CPU, at no wait for the device in the forward. Skipped where there is none.

`-s` prints what looking for them costs in prefill.
"""

from __future__ import annotations

from math import inf, nan
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

from dinfer.engine.finite import FiniteCheck, NonFinite, largest_values
from dinfer.model.decoder import Decoder
from dinfer.plan.ops import Op
from dinfer.plan.partition import Shape
from tests.gpu.test_digests import WAITS, _alone, _calls, wide
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt, twin

__all__ = ["wide"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
    pytest.mark.timeout(600),
]

IDS = list(prompt(40))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder.load(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), layers=6), device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_largest_values_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    hidden, block = torch.randn(1, 130, 96).to(dtype), torch.randn(130, 2, 3, 32).to(dtype)
    hidden[0, 7, 5], hidden[0, 129, 0] = nan, -inf
    block[3, 0, 2, 31], block[64, 1, 0, 0] = inf, nan
    want = largest_values(hidden, block, torch.empty((130, 3)))
    got = largest_values(hidden.cuda(), block.cuda(), torch.empty((130, 3), device="cuda")).cpu()
    torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=0)
    assert (~want.isfinite()).sum() == 4


def test_each_of_many_ops_is_looked_at() -> None:
    found: list[NonFinite] = []
    shape = Shape(layers=1, tokens=4 * 512, chunk_size=4, starts=(0,))
    check = FiniteCheck(0, shape, torch.device("cuda"), found.append, lambda _: None)
    for chunk in range(512):
        hidden = torch.ones(1, 4, 8, device="cuda")
        hidden[0, 2, 1] = nan if chunk % 3 == 0 else 1
        check.made(Op("layer", chunk, 0), hidden)
    check.settle()
    assert [one.chunk for one in found] == list(range(0, 512, 3))
    check.close()


def test_what_a_layer_spoils_is_found_on_the_rank_that_runs_it(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Decoder.layer

    def spoilt(self: Decoder, index: int, hidden: Tensor, cache: Any, position: int) -> Tensor:
        output = layer(self, index, hidden, cache, position)
        if (index, position) == (1, 8):
            output[0, 2, 3] = inf
        return output

    monkeypatch.setattr(Decoder, "layer", spoilt)
    found: dict[int, NonFinite] = {}
    with twin(decoder, world_size=3, chunk_size=8) as made:
        for engine in made.engines:
            engine._on_nonfinite = lambda one: found.update({one.rank: one})
        made.all(lambda engine: engine.prefill_phase(IDS))
        for engine in made.engines:
            engine.executor.state.finite.settle()
    first = min(found.values(), key=lambda one: one.order)
    assert first == NonFinite(0, "layer", 1, 1, "hidden", "Inf", token=10)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events.*")
def test_looking_adds_no_synchronisation_to_the_forward(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wait where the prompt is prepared; a thread that no op waits for then waits for each event."""
    counts = {}
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(FiniteCheck, "made", lambda *_: None)
        engine = _alone(decoder, digests=True)
        try:
            _calls(engine)  # the first prefill allocates
            counts[looks] = _calls(engine)
        finally:
            assert engine.release()
    more = {name: counts[True][name] - counts[False][name] for name in WAITS}
    assert more["cudaDeviceSynchronize"] == 0
    assert more["cudaStreamSynchronize"] == 0  # both make the buffers
    assert more["cudaEventSynchronize"] > 0


def test_the_cost_is_printed(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, ids = Decoder.load(wide, "bfloat16", "cuda"), list(prompt(1024, vocab=1000))
    took: dict[bool, list[float]] = {True: [], False: []}
    for number in range(9):
        for looks in (True, False):
            with monkeypatch.context() as patch, twin(decoder, world_size=1, chunk_size=128) as made:
                if not looks:
                    patch.setattr(FiniteCheck, "made", lambda *_: None)
                made.all(lambda engine: engine.prepare(ids))
                torch.cuda.synchronize()
                began = perf_counter()
                made.all(lambda engine: engine.prefill_phase())
                torch.cuda.synchronize()
                took[looks] += [perf_counter() - began] if number > 1 else []
    on, off = median(took[True]), median(took[False])
    print(f"\nprefill of 1,024 tokens by 128, 6 layers of Qwen3-4B's shape in bf16, one rank: {on * 1e3:.1f} ms "
          f"looking for NaN and Inf, {off * 1e3:.1f} ms without ({on / off - 1:+.1%})")  # fmt: skip
    assert len(took[True]) == len(took[False]) == 7

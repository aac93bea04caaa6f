"""What lanes launch on a GPU: in the right order, waiting for no more than they must, recorded for free.

Skipped where there is no CUDA device.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dinfer.engine.engine import Engine
from dinfer.model.decoder import Decoder
from dinfer.plan.ops import Value
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder
from dinfer.transport.cuda_order import Ordering
from tests.gpu.test_digests import blind
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import Twin, prompt, twin

__all__ = ["blind"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
]

IDS = list(prompt(40))
CYCLES = 1_000_000_000
"""of a kernel that does nothing, for about half a second"""
SYNCHRONISING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaStreamWaitEvent",
)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder.load(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), layers=6), device="cuda")


def _alone(decoder: Decoder) -> str:
    """The SHA-256 of the KV that one thread computes."""
    cache = decoder.new_cache(len(IDS))
    for start in range(0, len(IDS), 8):
        decoder.forward(IDS[start : start + 8], cache, start)
    return cache.sha256(len(IDS))


def _sleep(cycles: int) -> None:
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("sync_strategy", ["pairwise", "ring"])
@pytest.mark.parametrize("rendezvous", [True, False])
def test_ranks_hold_what_one_process_computes(
    decoder: Decoder, sync_strategy: str, *, rendezvous: bool
) -> None:
    expected = _alone(decoder)
    with twin(
        decoder, world_size=3, chunk_size=8, sync_strategy=sync_strategy, rendezvous=rendezvous
    ) as made:
        results = made.all(lambda engine: engine.prefill_phase(IDS))
        held = [engine.cache.sha256(len(IDS)) for engine in made.engines if engine.cache is not None]
    assert held == [expected] * 3
    assert all(torch.equal(result.hidden_states, results[0].hidden_states) for result in results)


def test_a_send_waits_for_its_value_and_for_nothing_launched_since() -> None:
    ordering, value = Ordering(torch.device("cuda")), Value("kv", 0, 0)
    host = torch.empty(1000, pin_memory=True)
    tensor = torch.zeros(1000, device="cuda")
    _sleep(CYCLES)
    tensor += 1
    ordering.launched([value])
    _sleep(4 * CYCLES)
    since = torch.cuda.current_stream().record_event()
    with ordering.reading(value):
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream().synchronize()
    waited_for_all = since.query()
    assert host.eq(1).all()
    assert not waited_for_all


def test_a_value_made_by_others_is_read_behind_all_that_was_launched() -> None:
    ordering, value = Ordering(torch.device("cuda")), Value("kv", 0, 0)
    host = torch.empty(1000, pin_memory=True)
    tensor = torch.zeros(1000, device="cuda")
    ordering.launched([value])
    _sleep(CYCLES)
    tensor += 1
    ordering.forget()
    with ordering.reading(value):
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream().synchronize()
    assert host.eq(1).all()


class _Off(Recorder):
    """A recorder that records nothing."""

    def record(self, lane: int, event: Event) -> None:
        pass


def _calls(made: Twin, *, recorded: bool) -> Counter[str]:
    """The CUDA calls of one prefill on all ranks, in which no kernel is new."""

    def run(engine: Engine) -> None:
        executor = engine.prepare(IDS)
        if not recorded:
            executor.recorder = _Off(engine.rank, executor.recorder.lanes, 1)
        engine.comm.all_gather(b"s")
        engine.prefill_phase()

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        made.all(run)
        torch.cuda.synchronize()
    name = "on" if recorded else "off"
    rows = [row for row in profiled.key_averages() if row.key.startswith("cu")]
    print(f"\nCUDA calls of one prefill on 3 ranks, recorder {name}:")
    for row in sorted(rows, key=lambda row: -row.count):
        print(f"{row.key:<32}{row.count:>8} calls{row.self_cpu_time_total / 1e3:>12.3f} ms")
    return Counter({row.key: row.count for row in rows})


@pytest.mark.usefixtures("blind")
@pytest.mark.filterwarnings("ignore:.*Profiler clears events.*")
def test_the_recorder_adds_no_synchronisation(decoder: Decoder) -> None:
    with twin(decoder, world_size=3, chunk_size=8) as made:
        _calls(made, recorded=True)  # the first prefill allocates
        off, on = _calls(made, recorded=False), _calls(made, recorded=True)
        assert sum(len(engine.recorder.events()) for engine in made.engines if engine.recorder) > 0
    assert off["cudaLaunchKernel"] > 0
    assert {name: on[name] for name in SYNCHRONISING} == {name: off[name] for name in SYNCHRONISING}

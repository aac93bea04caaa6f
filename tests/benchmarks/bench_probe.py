"""What the probe costs in a watched process: for each op on torch's fake backend, where an op takes no time of its own,
and for each layer of a model whose KV it digests.

Microseconds of CPU time of the calling thread, and of wall time beside it: medians of trials that take turns, watched
and not, so that what else the machine does meets both. Run as `python tests/benchmarks/bench_probe.py` from the root;
with `--full-ring` so many ops are recorded before that old ones make room. Not a test: times are never asserted.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import DynamicCache, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from dinfer.watch.probe.records import MOST_SEGMENTS, SEGMENT_RECORDS
from dinfer.watch.probe.start import Probe

TRIALS, ROUNDS, CALLS = 15, 20, 40
TENSOR, PARTS = torch.zeros(4), [torch.zeros(4) for _ in range(4)]
OPS: dict[str, Callable[[], object]] = {
    "send": lambda: dist.send(TENSOR, 1),
    "isend, wait": lambda: dist.isend(TENSOR, 1).wait(),  # type: ignore[union-attr]
    "all_reduce": lambda: dist.all_reduce(TENSOR),
    "all_gather": lambda: dist.all_gather(PARTS, TENSOR),
}


def in_loops(call: Callable[[], object]) -> None:
    """As programs call: from a function whose variables name layer and chunk."""
    for layer_idx in range(CALLS // 20):
        for chunk in range(20):
            call()
            del chunk
        del layer_idx


def seconds(work: Callable[[], object], rounds: int) -> tuple[float, float]:
    """CPU and wall time of a round, in the median."""
    cpu, wall = [], []
    for _ in range(rounds):
        begun = thread_time(), perf_counter()
        work()
        cpu.append(thread_time() - begun[0])
        wall.append(perf_counter() - begun[1])
    return median(cpu), median(wall)


def medians(values: list[tuple[float, float]], scale: float) -> tuple[float, float]:
    """Of the trials."""
    return median(cpu for cpu, _ in values) * scale, median(wall for _, wall in values) * scale


def prefill(model: Qwen3Model, ids: torch.Tensor) -> None:
    """A prompt in chunks of 128."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for chunk in ids.split(128, dim=1):  # type: ignore[no-untyped-call]
            model(chunk, past_key_values=cache)


def main() -> None:
    """A line for each op, and one for the model."""
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    config = Qwen3Config(
        vocab_size=64, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    model, ids = Qwen3Model(config), torch.zeros(1, 512, dtype=torch.int64)
    plain: dict[str, list[tuple[float, float]]] = {name: [] for name in (*OPS, "prefill")}
    watched: dict[str, list[tuple[float, float]]] = {name: [] for name in (*OPS, "prefill")}
    for trial in range(TRIALS):
        for found in (plain, watched):
            with tempfile.TemporaryDirectory() as folder:
                probe = Probe(folder) if found is watched else None
                if probe and "--full-ring" in sys.argv:
                    for _ in range(MOST_SEGMENTS * SEGMENT_RECORDS):
                        dist.send(TENSOR, 1)
                for name, call in OPS.items():
                    found[name].append(seconds(partial(in_loops, call), ROUNDS))
                if trial < TRIALS // 3:
                    found["prefill"].append(seconds(lambda: prefill(model, ids), 1))
                if probe:
                    probe.stop()
    print(f"{'op':<14}{'plain µs':>18}{'watched µs':>18}{'probe µs':>18}   CPU, wall")
    for name in OPS:
        before, after = (medians(found[name], 1e6 / CALLS) for found in (plain, watched))
        columns = (before, after, (after[0] - before[0], after[1] - before[1]))
        print(f"{name:<14}{''.join(f'{cpu:10.1f}{wall:8.1f}' for cpu, wall in columns)}")
    alone, digested = (medians(found["prefill"], 1)[0] for found in (plain, watched))
    print(
        f"KV digests: {digested / alone - 1:+.1%} of a prefill whose layers take {alone / 16 * 1000:.0f} ms"
    )


if __name__ == "__main__":
    main()

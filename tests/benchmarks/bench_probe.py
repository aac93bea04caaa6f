"""What the probe costs in a watched process: for each op on torch's fake backend, where an op takes no time of its own,
and for each layer of a model whose KV it digests.

CPU seconds of one core, the best of many short rounds. Run as `python tests/benchmarks/bench_probe.py` from the root.
Not a test: times are never asserted.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import thread_time

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import DynamicCache, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from dinfer.watch.probe.start import Probe

ROUNDS, CALLS = 100, 200
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


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """CPU time of the best round: other processes take it from none."""
    times = []
    for _ in range(rounds):
        begun = thread_time()
        work()
        times.append(thread_time() - begun)
    return min(times)


def microseconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    return seconds(lambda: in_loops(call)) / CALLS * 1e6


def prefill(model: Qwen3Model, ids: torch.Tensor) -> None:
    """A prompt in chunks of 128."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for chunk in ids.split(128, dim=1):
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
    plain = {name: microseconds(call) for name, call in OPS.items()}
    plain_prefill = seconds(lambda: prefill(model, ids), 5)
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(folder)
        print(f"{'op':<14}{'plain µs':>10}{'watched µs':>12}{'probe µs':>10}")
        for name, call in OPS.items():
            watched = microseconds(call)
            print(f"{name:<14}{plain[name]:10.1f}{watched:12.1f}{watched - plain[name]:10.1f}")
        watched_prefill = seconds(lambda: prefill(model, ids), 5)
        probe.stop()
    share = watched_prefill / plain_prefill - 1
    layer_ms = plain_prefill / 16 * 1000
    print(f"KV digests: {share:+.1%} of a prefill whose layers take {layer_ms:.0f} ms")


if __name__ == "__main__":
    main()

"""What the probe costs in a watched process: for each op on torch's fake backend, where an op takes no time of its own,
and for each layer of a model whose KV it digests.

CPU time of the calling thread. Trials without and with the probe take turns within one process, so that what else the
machine does meets both; of each pair the difference is taken, and of these the median, with the quartiles beside it.
Run as `python tests/benchmarks/bench_probe.py` from the root; with `--full-ring` so many ops are recorded before that
old ones make room. Not a test: times are never asserted.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import thread_time

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import DynamicCache, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from dinfer.watch.probe.records import MOST_SEGMENTS, SEGMENT_RECORDS
from dinfer.watch.probe.start import Probe

TRIALS, ROUNDS, CALLS = 20, 10, 40
TENSOR, PARTS = torch.zeros(4), [torch.zeros(4) for _ in range(4)]


def batch() -> None:
    """Two ops."""
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, TENSOR, 1), dist.P2POp(dist.irecv, TENSOR, 2)]
    ):
        work.wait()


OPS: dict[str, tuple[int, Callable[[], object]]] = {
    "send": (1, lambda: dist.send(TENSOR, 1)),
    "recv": (1, lambda: dist.recv(TENSOR, 1)),
    "isend, wait": (1, lambda: dist.isend(TENSOR, 1).wait()),  # type: ignore[union-attr]
    "irecv, wait": (1, lambda: dist.irecv(TENSOR, 1).wait()),  # type: ignore[union-attr]
    "batch_isend_irecv": (2, batch),
    "all_reduce": (1, lambda: dist.all_reduce(TENSOR)),
    "all_gather": (1, lambda: dist.all_gather(PARTS, TENSOR)),
}
"""how many ops a call makes, and the call"""

LAYERS, CHUNKS = 4, 4
TOKENS = (128, 24, 1)
"""of a chunk"""


def in_loops(call: Callable[[], object]) -> None:
    """As programs call: from a function whose variables name layer and chunk."""
    for layer_idx in range(CALLS // 20):
        for chunk in range(20):
            call()
            del chunk
        del layer_idx


def seconds(work: Callable[[], object], rounds: int) -> float:
    """CPU time of a round, in the median."""
    found = []
    for _ in range(rounds):
        begun = thread_time()
        work()
        found.append(thread_time() - begun)
    return median(found)


def prefill(model: Qwen3Model, ids: torch.Tensor, tokens: int) -> None:
    """A prompt in chunks of so many tokens."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for chunk in ids[:, : CHUNKS * tokens].split(tokens, dim=1):  # type: ignore[no-untyped-call]
            model(chunk, past_key_values=cache)


def spread(values: list[float], form: str) -> str:
    """The median, and the quartiles."""
    low, middle, high = (format(value, form) for value in quantiles(values, n=4))
    return f"{middle} ({low} to {high})"


def main() -> None:
    """A line for each op, and one for each length of chunks."""
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    config = Qwen3Config(
        vocab_size=64, hidden_size=1024, intermediate_size=3072, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    model, ids = Qwen3Model(config), torch.zeros(1, CHUNKS * max(TOKENS), dtype=torch.int64)
    works: dict[str, tuple[Callable[[], float], float]] = {
        name: (partial(seconds, partial(in_loops, call), ROUNDS), 1e6 / CALLS / count)
        for name, (count, call) in OPS.items()
    }
    for tokens in TOKENS:
        forward = partial(seconds, partial(prefill, model, ids, tokens), 1)
        works[f"chunks of {tokens}"] = (forward, 1e3 / LAYERS / CHUNKS)
    plain: dict[str, list[float]] = {name: [] for name in works}
    watched: dict[str, list[float]] = {name: [] for name in works}
    for trial in range(TRIALS):
        # each the first as often as the second
        for found in (plain, watched) if trial % 2 else (watched, plain):
            with tempfile.TemporaryDirectory() as folder:
                probe = Probe(folder) if found is watched else None
                if probe and "--full-ring" in sys.argv:
                    for _ in range(MOST_SEGMENTS * SEGMENT_RECORDS):
                        dist.send(TENSOR, 1)
                for name, (work, scale) in works.items():
                    found[name].append(work() * scale)
                if probe:
                    probe.stop()
    print(f"{'op':<20}{'plain µs':>10}{'watched µs':>12}   probe µs: median (quartiles) of {TRIALS} pairs")
    for name in OPS:
        added = [after - before for before, after in zip(plain[name], watched[name], strict=True)]
        print(f"{name:<20}{median(plain[name]):10.1f}{median(watched[name]):12.1f}   {spread(added, '.1f')}")
    for tokens in TOKENS:
        before, after = plain[f"chunks of {tokens}"], watched[f"chunks of {tokens}"]
        ratios = [one / other - 1 for one, other in zip(after, before, strict=True)]
        added = [(one - other) * 1e3 for one, other in zip(after, before, strict=True)]
        print(
            f"KV digests, {tokens} tokens: {spread(ratios, '+.1%')} of a layer that takes {median(before):.1f} ms: "
            f"{spread(added, '.0f')} µs"
        )


if __name__ == "__main__":
    main()

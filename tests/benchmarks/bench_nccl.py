"""Prefill seconds of several ranks with a GPU each, over one backend; run it once for each.

torchrun --standalone --nproc-per-node 2 tests/benchmarks/bench_nccl.py MODEL nccl|gloo [TOKENS] [REPEATS]
"""

from __future__ import annotations

import os
import sys
from statistics import median
from time import perf_counter

from dinfer.config import Config
from dinfer.engine.engine import Engine
from dinfer.launch.application import open_engine


def prefill(engine: Engine, ids: list[int]) -> float:
    """Seconds from when all ranks are ready until all are done."""
    engine.prepare(ids)
    engine.comm.all_gather(b"s")
    started = perf_counter()
    engine.prefill_phase()
    engine.comm.all_gather(b"e")
    return perf_counter() - started


def main(model: str, backend: str, tokens: int = 1000, repeats: int = 5) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    config = Config.of(
        {
            "model_path": model,
            "backend": backend,
            "world_size": world_size,
            "gpu_ids": range(world_size),
            "threads": 4,
        }
    )
    with open_engine(config) as engine:
        ids = [(i * i * 7 + i * 13 + 5) % engine.decoder.vocab_size for i in range(tokens)]
        took = [prefill(engine, ids) for _ in range(repeats + 1)][1:]  # the first one warms up
        if engine.rank == 0:
            listed = ", ".join(f"{seconds:.3f}" for seconds in took)
            print(
                f"{backend}: {tokens} tokens on {world_size} ranks: median {median(took):.3f} s of {listed}"
            )
        assert engine.cache is not None
        print(f"rank {engine.rank} {backend} KV {engine.cache.sha256(tokens)[:16]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

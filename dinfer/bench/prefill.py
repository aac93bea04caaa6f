"""`dinfer bench`: pairwise, ring, lockstep, no sync and one process side by side, as medians and ratios.

Comparing strategies over prompt lengths and chunk sizes is done beside this, on ranks started here.
"""

import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dinfer.config import Config
from dinfer.display import Table

if TYPE_CHECKING:
    from dinfer.bench.rank import BenchCase, TimedPrefill


@dataclass(frozen=True)
class BenchModel:
    """A random Qwen3 to time: its sizes as in config.json; float32."""

    hidden_size: int = 1024
    layers: int = 8
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 3072
    vocab_size: int = 1024


@contextmanager
def random_checkpoint(shape: BenchModel) -> Iterator[Path]:
    """A checkpoint of that shape with random weights, in a folder that is removed afterwards."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="dinfer-bench-") as folder:
        Qwen3ForCausalLM(config).save_pretrained(folder)
        yield Path(folder)


def bench(config: Config, tokens: int, vocab_size: int, repeats: int) -> dict[str, Any]:
    """Time every variant on fresh ranks; seconds by variant, their medians, and what the medians say.

    Raises RuntimeError if a rank fails.
    """
    from dinfer.bench.rank import VARIANTS, BenchCase

    cases = [BenchCase(variant, tokens, config.chunk_size) for variant in VARIANTS]
    first = on_ranks(config, vocab_size, cases, repeats)[0]  # which alone timed the variant that runs alone
    seconds = {
        case.variant.name: [timed.seconds for timed in took] for case, took in zip(cases, first, strict=True)
    }
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "tokens": tokens,
        "chunk_size": config.chunk_size,
        "world_size": config.world_size,
        "threads": config.threads,
        "repeats": repeats,
        "seconds": seconds,
        "medians": medians,
        "pipelined_over_one_process": medians["one process"] / medians["pipelined, pairwise"],
        "pipelined_over_lockstep": medians["lockstep, pairwise"] / medians["pipelined, pairwise"],
        "sync_over_no_sync": medians["pipelined, pairwise"] / medians["pipelined, no sync"] - 1,
    }


def table(result: dict[str, Any]) -> str:
    one = result["medians"]["one process"]
    rows = [
        [name, *(f"{value:.3f}" for value in (took, min(seconds), max(seconds))), f"{one / took:.2f}"]
        for (name, took), seconds in zip(result["medians"].items(), result["seconds"].values(), strict=True)
    ]
    return (
        f"prefill of {result['tokens']} tokens in chunks of {result['chunk_size']}, {result['world_size']} ranks, "
        f"threads each: {result['threads']}; medians of {result['repeats']}, in turn\n"
        f"{Table(('variant', 'seconds', 'min', 'max', '× one process'), rows)}\n"
        f"pipelined pairwise is {result['pipelined_over_one_process']:.2f} × one process and "
        f"{result['pipelined_over_lockstep']:.2f} × lockstep; its sync costs {result['sync_over_no_sync']:+.1%}"
    )


def on_ranks(
    config: Config, vocab_size: int, cases: "Sequence[BenchCase]", repeats: int
) -> "list[list[list[TimedPrefill]]]":
    """What fresh ranks measured, by rank, case and round. Raises RuntimeError if a rank fails."""
    ids = [(i * i * 7 + i * 13 + 5) % vocab_size for i in range(max(case.tokens for case in cases))]
    context = multiprocessing.get_context("spawn")
    # One pipe to each rank but 0 for the port, one from each rank for its results.
    ports = [context.Pipe(duplex=False) for _ in range(config.world_size)]
    results = [context.Pipe(duplex=False) for _ in range(config.world_size)]
    ranks = [
        context.Process(
            target=_rank,
            args=(
                rank,
                config,
                ports[0][1] if rank == 0 else ports[rank][0],
                results[rank][1],
                ids,
                cases,
                repeats,
            ),
        )
        for rank in range(config.world_size)
    ]
    try:
        for rank in ranks:
            rank.start()
        opened = _receive(ports[0][0], ranks)
        for _, writer in ports[1:]:
            writer.send(opened)
        return [_receive(reader, ranks) for reader, _ in results]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _receive(reader: Connection, ranks: Sequence[Any]) -> Any:
    while not reader.poll(0.2):
        if dead := [n for n, rank in enumerate(ranks) if rank.exitcode not in (None, 0)]:
            raise RuntimeError(f"rank {dead[0]} of the benchmark failed; what it printed says why.")
    return reader.recv()


def _rank(
    rank: int,
    config: Config,
    port: Connection,
    result: Connection,
    ids: Sequence[int],
    cases: "Sequence[BenchCase]",
    repeats: int,
) -> None:
    from dinfer.bench.rank import bench_rank

    result.send(bench_rank(rank, config, port, ids, cases, repeats))

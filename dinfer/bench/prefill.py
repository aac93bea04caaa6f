"""`dinfer bench` and `dinfer bench digests`: variants of prefill, timed in turn on the same ranks.

The ranks, also those that compare strategies (`strategies`), run `rank`. They meet at a store that this process opens,
and leave their times in it.
"""

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from dinfer.config import Config
from dinfer.display import Table
from dinfer.launch.processes import end_ranks, start_rank

if TYPE_CHECKING:
    from dinfer.bench.rank import BenchCase, TimedPrefill

R = TypeVar("R")


@dataclass(frozen=True)
class BenchModel:
    """The shape of a random float32 Qwen3 to time, as in config.json."""

    hidden_size: int = 1024
    layers: int = 8
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 3072
    vocab_size: int = 1024


@contextmanager
def random_checkpoint(shape: BenchModel) -> Iterator[Path]:
    """A checkpoint of that shape with random weights, in a temporary folder."""
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
    """Time every variant on new ranks. Returns seconds by variant, their medians, and ratios of these.

    Raises RuntimeError if a rank fails.
    """
    from dinfer.bench.rank import VARIANTS, BenchCase

    cases = [BenchCase(variant, tokens, config.chunk_size) for variant in VARIANTS]
    first = on_ranks(config, vocab_size, cases, repeats)[0]  # rank 0 also timed "one process"
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
        f"{Table(('variant', 'seconds', 'min', 'max', 'speed-up over one process'), rows)}\n"
        f"speed-up of pipelined pairwise (above 1 it is faster): {result['pipelined_over_one_process']:.2f} over one "
        f"process, {result['pipelined_over_lockstep']:.2f} over lockstep; sync changes its time by "
        f"{result['sync_over_no_sync']:+.1%}"
    )


def on_ranks(
    config: Config, vocab_size: int, cases: "Sequence[BenchCase]", repeats: int
) -> "list[list[list[TimedPrefill]]]":
    """Start ranks and time all cases; by rank, case and round. Raises RuntimeError if a rank fails."""
    from dinfer.bench.rank import BenchJob, TimedPrefill

    ids = prompt_of(max(case.tokens for case in cases), vocab_size)
    return run_ranks(
        "dinfer.bench.rank",
        config,
        lambda met: BenchJob(asdict(met), ids, cases, repeats),
        list[list[TimedPrefill]],
    )


def prompt_of(tokens: int, vocab_size: int) -> list[int]:
    """Token ids for a benchmark."""
    return [(i * i * 7 + i * 13 + 5) % vocab_size for i in range(tokens)]


def run_ranks(
    module: str,
    config: Config,
    job: Callable[[Config], object],
    result: type[R],
    behind: Sequence[Sequence[str]] = (),
) -> list[R]:
    """Start a process for each rank that runs `module`, and wait for the result that each leaves at the store where
    they meet; by rank. `job(config)`: what each is started with beside its rank. `behind`: by rank, the command that
    runs it elsewhere. Raises RuntimeError if a rank fails."""
    from dinfer.bench.rank import result_key
    from dinfer.transport.gloo import open_store
    from dinfer.transport.interface import check_own_address

    check_own_address(config.master_addr)
    store, port = open_store(config.master_addr, config.master_port)
    part = job(config.with_(master_port=port))
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(config.world_size):
            of_rank = msgspec.json.encode((rank, part))
            where = behind[rank] if behind else ()
            ranks.append(start_rank(module, of_rank, config.threads, behind=where))
        results = [result_key(rank) for rank in range(config.world_size)]
        while not store.check(results):
            if failed := [rank for rank, process in enumerate(ranks) if process.poll()]:
                raise RuntimeError(f"rank {failed[0]} of the benchmark failed; see its output.")
            time.sleep(0.2)
        return [msgspec.json.decode(store.get(name), type=result) for name in results]
    finally:
        end_ranks(ranks)


# -- dinfer bench digests: prefill with digests of all blocks and without, and the check before decode

DIGESTS_MODEL = BenchModel(
    hidden_size=2560, layers=4, heads=32, kv_heads=8, head_dim=128, intermediate_size=9728
)
"""Qwen3-4B with few layers, so that it fits into any machine"""

DIGESTS_TARGET = 0.02


def bench_digests(config: Config, tokens: int, vocab_size: int, repeats: int) -> dict[str, Any]:
    """Time `repeats` pairs of rounds, with digests and without.

    Wall time is what a user notices; the ranks' CPU time varies less on a busy machine. Raises ConfigError, and
    RuntimeError if a rank fails.
    """
    from dinfer.bench.rank import BenchCase, Variant

    variants = Variant("digests"), Variant("no digests", digests=False)
    cases = [BenchCase(variant, tokens, config.chunk_size) for variant in variants]
    on, off = zip(*on_ranks(config, vocab_size, cases, repeats), strict=True)
    rounds = [
        (_slowest(pair[0]), _slowest(pair[1]))
        for pair in zip(zip(*on, strict=True), zip(*off, strict=True), strict=True)
    ]
    about = {"tokens": tokens, "chunk_size": config.chunk_size, "world_size": config.world_size}
    return {**about, "threads": config.threads, "repeats": repeats, **digest_figures(rounds)}


def digest_figures(rounds: "list[tuple[TimedPrefill, TimedPrefill]]") -> dict[str, Any]:
    """Medians of rounds with and without digests; costs as parts of prefill without, by pair of rounds."""
    costs = [on.seconds / off.seconds - 1 for on, off in rounds]
    cpu = [on.cpu_s / off.cpu_s - 1 for on, off in rounds]
    off_s, check_s = median(off.seconds for _, off in rounds), median(on.check_s for on, _ in rounds)
    return {
        "seconds": {"on": [on.seconds for on, _ in rounds], "off": [off.seconds for _, off in rounds]},
        "cpu_s": {"on": [on.cpu_s for on, _ in rounds], "off": [off.cpu_s for _, off in rounds]},
        "check_s": [on.check_s for on, _ in rounds],
        "median_on": median(on.seconds for on, _ in rounds),
        "median_off": off_s,
        "cost": median(costs),
        "costs": [min(costs), max(costs)],
        "cpu_cost": median(cpu),
        "cpu_costs": [min(cpu), max(cpu)],
        "check_share": check_s / off_s,
    }


def digests_table(result: dict[str, Any]) -> str:
    check = median(result["check_s"])
    return "\n".join(
        [
            f"prefill of {result['tokens']} tokens in chunks of {result['chunk_size']}, {result['world_size']} ranks, "
            f"threads each: {result['threads']}; medians of {result['repeats']} pairs, in turn",
            f"wall time: {result['median_on']:.3f} s with digests, {result['median_off']:.3f} s without: "
            f"{_cost_text(result, 'cost')} (target: at most {DIGESTS_TARGET:.0%})",
            f"CPU time of the ranks: {_cost_text(result, 'cpu_cost')}",
            f"the check before decode, not included: {check:.3f} s, {result['check_share']:.2%} of prefill",
        ]
    )


def _cost_text(result: dict[str, Any], name: str) -> str:
    low, high = result[f"{name}s"]
    return f"{result[name]:+.2%}, {low:+.2%} to {high:+.2%} in pairs"


def _slowest(ranks: "tuple[TimedPrefill, ...]") -> "TimedPrefill":
    """One round: the times of the slowest rank, and the CPU seconds of all ranks."""
    slowest = max(ranks, key=lambda timed: timed.seconds)
    return slowest._replace(
        cpu_s=sum(timed.cpu_s for timed in ranks), check_s=max(timed.check_s for timed in ranks)
    )

"""`dinfer bench digests`: what digests of all blocks cost in prefill, and apart from it the check before decode.

Prefill with and without them, in turn on the same ranks, at the KV shape of Qwen3-4B. Wall time is what a user feels;
the ranks' CPU time scatters less where a machine does other things too. Rounds are compared in pairs.
"""

from statistics import median
from typing import TYPE_CHECKING, Any

from dinfer.bench.prefill import BenchModel, on_ranks
from dinfer.config import Config

if TYPE_CHECKING:
    from dinfer.bench.rank import TimedPrefill

SHAPE = BenchModel(hidden_size=2560, layers=4, heads=32, kv_heads=8, head_dim=128, intermediate_size=9728)
"""Qwen3-4B's, with few layers, so that it fits into any machine"""

TARGET = 0.02


def bench_digests(config: Config, tokens: int, vocab_size: int, repeats: int) -> dict[str, Any]:
    """Seconds of `repeats` pairs of rounds, and what they say. Raises ConfigError, or RuntimeError if a rank fails."""
    from dinfer.bench.rank import BenchCase, Variant

    variants = Variant("digests"), Variant("no digests", digests=False)
    cases = [BenchCase(variant, tokens, config.chunk_size) for variant in variants]
    on, off = zip(*on_ranks(config, vocab_size, cases, repeats), strict=True)
    rounds = [
        (_round(pair[0]), _round(pair[1]))
        for pair in zip(zip(*on, strict=True), zip(*off, strict=True), strict=True)
    ]
    about = {"tokens": tokens, "chunk_size": config.chunk_size, "world_size": config.world_size}
    return {**about, "threads": config.threads, "repeats": repeats, **figures(rounds)}


def figures(rounds: "list[tuple[TimedPrefill, TimedPrefill]]") -> dict[str, Any]:
    """Of rounds with and without digests: medians, and costs as shares of prefill without."""
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


def table(result: dict[str, Any]) -> str:
    check = median(result["check_s"])
    return "\n".join(
        [
            f"prefill of {result['tokens']} tokens in chunks of {result['chunk_size']}, {result['world_size']} ranks, "
            f"threads each: {result['threads']}; medians of {result['repeats']} pairs, in turn",
            f"wall time: {result['median_on']:.3f} s with digests, {result['median_off']:.3f} s without: "
            f"{_share(result, 'cost')} (target: at most {TARGET:.0%})",
            f"CPU time of the ranks: {_share(result, 'cpu_cost')}",
            f"the check before decode, apart: {check:.3f} s, {result['check_share']:.2%} of prefill",
        ]
    )


def _share(result: dict[str, Any], name: str) -> str:
    low, high = result[f"{name}s"]
    return f"{result[name]:+.2%}, {low:+.2%} to {high:+.2%} in pairs"


def _round(ranks: "tuple[TimedPrefill, ...]") -> "TimedPrefill":
    """Of one round: the slowest rank's times, and the CPU seconds of all."""
    slowest = max(ranks, key=lambda timed: timed.seconds)
    return slowest._replace(
        cpu_s=sum(timed.cpu_s for timed in ranks), check_s=max(timed.check_s for timed in ranks)
    )

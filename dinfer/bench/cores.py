"""`dinfer bench cores`: what several ranks make of a machine's cores, beside one process that has all of them; and
decode beside transformers' `generate`.

All variants run on the same processes, in turn, so that what else the machine does meets each of them.
"""

from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from dinfer.bench.links import lengths_of, machine_of
from dinfer.bench.prefill import prompt_of, run_ranks
from dinfer.config import Config, ConfigError
from dinfer.display import Table
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.planner.choose import CHOICES, Candidate, Planner, even_starts, sized_lengths

if TYPE_CHECKING:
    from dinfer.bench.cores_rank import CoresTimes

NEW_TOKENS = 32


class Target(NamedTuple):
    """`variant` is to be at least `ratio` times as fast as `over`."""

    variant: str
    over: str
    ratio: float


CHUNKED, WHOLE = "one process, all cores, in chunks", "one process, all cores, whole prompt"
PIPELINED, PLANNED, LOCKSTEP = "pipelined, equal chunks", "pipelined, as planned", "lockstep, equal chunks"
DECODE, GENERATE = "decode, dinfer", "decode, transformers' generate"
"""as `cores_rank` names them"""

TARGETS = (
    Target(PIPELINED, CHUNKED, 0.97),
    Target(PLANNED, CHUNKED, 1.0),
    Target(PLANNED, WHOLE, 0.86),
    Target(PIPELINED, LOCKSTEP, 1.7),
    Target(DECODE, GENERATE, 1.0),
)


def check_asked(config: Config, tokens: int) -> None:
    """Raises ConfigError for what has nothing to compare."""
    if config.world_size < 2:
        raise ConfigError(f"world_size is {config.world_size}; bench cores needs at least 2 ranks.")
    if tokens <= config.chunk_size:
        raise ConfigError(
            f"tokens is {tokens} and chunk_size {config.chunk_size}; bench cores needs at least two chunks."
        )


def bench_cores(
    config: Config, vocab_size: int, layers: int, tokens: int, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure, choose a plan, and time all variants. Raises ConfigError, and RuntimeError if a rank fails."""
    from dinfer.bench.cores_rank import CoresJob, CoresTimes
    from dinfer.bench.link_rank import LinksJob, RankLinks

    check_asked(config, tokens)
    ids = prompt_of(tokens, vocab_size)
    lengths = lengths_of(config.chunk_size)
    say("measuring layers and links")
    measured = run_ranks(
        "dinfer.bench.link_rank",
        config,
        lambda met: LinksJob(asdict(met), ids, [], 0, lengths),
        RankLinks,
    )
    starts = even_starts(layers, config.world_size)
    usual = Candidate(starts, sized_lengths(tokens, config.chunk_size), "pipelined", "pairwise")
    chosen = Planner(machine_of(measured), layers).choose(usual, CHOICES)
    shape = partition(
        layers=layers, tokens=tokens, world_size=config.world_size, chunk_size=config.chunk_size
    )
    plans = {
        PIPELINED: usual.plan(layers),
        PLANNED: chosen.candidate.plan(layers),
        LOCKSTEP: build(shape, "lockstep", "pairwise"),
    }
    texts = {name: plan.text() for name, plan in plans.items()}
    say(f"{len(plans) + 2} variants of prefill and two of decode, {repeats} rounds")
    ranks = run_ranks(
        "dinfer.bench.cores_rank",
        config,
        lambda met: CoresJob(
            asdict(met), ids, texts, {CHUNKED: config.chunk_size, WHOLE: tokens}, repeats, NEW_TOKENS
        ),
        CoresTimes,
    )
    return {
        "tokens": tokens,
        "chunk_size": config.chunk_size,
        "world_size": config.world_size,
        "threads": config.threads,
        "new_tokens": NEW_TOKENS,
        "repeats": repeats,
        "planned": str(chosen.candidate),
        **figures(ranks),
    }


def figures(ranks: "list[CoresTimes]") -> dict[str, Any]:
    """Seconds by variant and round, until the slowest rank was done; their medians; and what the targets ask for. A
    ratio is the median of those of the rounds, in each of which the variants ran one after another."""
    seconds = {
        name: [max(of_round) for of_round in zip(*(rank.seconds[name] for rank in ranks), strict=True)]
        for name in ranks[0].seconds
    }
    ratios = []
    for variant, over, wanted in TARGETS:
        rounds = [b / a for a, b in zip(seconds[variant], seconds[over], strict=True)]
        ratios.append(
            {"variant": variant, "over": over, "target": wanted, "ratio": median(rounds), "rounds": rounds}
        )
    medians = {name: median(some) for name, some in seconds.items()}
    return {"seconds": seconds, "medians": medians, "ratios": ratios}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    rows = [
        [name, *(f"{value:.3f}" for value in (took, min(some), max(some)))]
        for (name, took), some in zip(result["medians"].items(), result["seconds"].values(), strict=True)
    ]
    ratios = [
        [
            one["variant"], one["over"], f"{one['ratio']:.2f}", f"{min(one['rounds']):.2f}–{max(one['rounds']):.2f}",
            f"{one['target']:.2f}", "yes" if one["ratio"] >= one["target"] else "no",
        ]
        for one in result["ratios"]
    ]  # fmt: skip
    cores = result["world_size"] * result["threads"]
    return (
        f"prefill of {result['tokens']:,} tokens in chunks of {result['chunk_size']}, {result['world_size']} ranks, "
        f"threads each: {result['threads']}, beside one process with {cores}; decode of {result['new_tokens']} tokens, "
        f"threads: {result['threads']}; medians of {result['repeats']}, in turn\n"
        f"{Table(('variant', 'seconds', 'min', 'max'), rows)}\n"
        f"planned: {result['planned']}\n"
        f"{Table(('as fast as', 'over', 'times', 'rounds', 'target', 'met'), ratios)}"
    )

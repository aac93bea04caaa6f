"""`dinfer bench planner`: the plan that the planner chooses beside a sweep of others and rules of other engines, all
timed on the same ranks, on even and on uneven machines.

Each case measures its machine, chooses, and runs every plan in turn. A slow rank runs each layer twice; a slow link is
limited in the network (`lab.hosts`), which needs root.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import permutations
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from dinfer.bench.links import lengths_of, machine_of
from dinfer.bench.prefill import prompt_of, run_ranks
from dinfer.config import Config, ConfigError
from dinfer.display import Table
from dinfer.lab.hosts import do, hosts, why_not
from dinfer.plan.plan import Plan
from dinfer.planner.choose import (
    CHOICES,
    Candidate,
    Planner,
    even_starts,
    quadratic_lengths,
    sized_lengths,
)

if TYPE_CHECKING:
    from dinfer.bench.link_rank import RankLinks

SLOW_LINK_BITS, LINK_BITS = 50_000_000, 500_000_000
"""bits per second of the slow wire between hosts, a tenth of the others"""

NEAR, CLOSE = 0.05, 0.10
"""targets: the choice within so much of the best of the sweep, the prediction within so much of what was measured"""


class PlannerCase(NamedTuple):
    """A machine: the factor by which each rank is slower (empty: none is), and the slow link between hosts, if the
    ranks are on hosts."""

    name: str
    slow: tuple[int, ...] = ()
    link: tuple[int, int] | None = None


def cases_of(world_size: int) -> list[PlannerCase]:
    """The machines that are timed."""
    slow = tuple(2 if rank == world_size // 2 else 1 for rank in range(world_size))
    return [
        PlannerCase("even"),
        PlannerCase("one rank 2 × slower", slow),
        PlannerCase("one link 10 × slower", link=(0, 1)),
    ]


def check_asked(config: Config) -> None:
    """Raises ConfigError for fewer than two ranks."""
    if config.world_size < 2:
        raise ConfigError(f"world_size is {config.world_size}; bench planner needs at least 2 ranks.")


def candidates_of(planner: Planner, default: Candidate) -> dict[str, Candidate]:
    """The sweep, by name: chunks of a quarter to four times the usual size; equal stages and those in proportion to the
    ranks' speed; both strategies; and the quadratic rule with half of its smoothing."""
    tokens, chunk_size = sum(default.lengths), max(default.lengths)
    sizes = sorted(
        {max(16, chunk_size // 4), max(16, chunk_size // 2), chunk_size, 2 * chunk_size, 4 * chunk_size}
    )
    splits = {"equal layers": default.starts, "layers by speed": planner.balanced(default.lengths)}
    found = dict[str, Candidate]()
    for split, starts in splits.items():
        for strategy in ("pairwise", "ring"):
            for size in sizes:
                lengths = sized_lengths(tokens, size)
                found[f"{split}, {strategy}, by {size}"] = Candidate(starts, lengths, "pipelined", strategy)
    quadratic = quadratic_lengths(tokens, 2 * chunk_size)
    found["equal layers, pairwise, quadratic rule"] = Candidate(
        default.starts, quadratic, "pipelined", "pairwise"
    )
    return found


def bench_planner(
    config: Config, vocab_size: int, layers: int, tokens: int, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """All cases; one that needs hosts is left out where there are none. Raises RuntimeError."""
    ids, skipped, found = prompt_of(tokens, vocab_size), dict[str, str](), list[dict[str, Any]]()
    for case in cases_of(config.world_size):
        if case.link and (reason := why_not()):
            skipped[case.name] = reason
            continue
        with _place(config, case) as (placed, behind):
            say(f"{case.name}: measured")
            machine = machine_of(_run(placed, case, ids, [], 0, behind))
            planner = Planner(machine, layers)
            default = Candidate(
                even_starts(layers, config.world_size),
                sized_lengths(tokens, config.chunk_size),
                "pipelined",
                "pairwise",
            )
            chosen = planner.choose(default, CHOICES)
            others = candidates_of(planner, default)
            plans = [one.plan(layers) for one in (chosen.candidate, *others.values())]
            say(f"{case.name}: {len(plans)} plans, {repeats} rounds")
            ranks = _run(placed, case, ids, plans, repeats, behind)
        seconds = dict(zip(("chosen", *others), map(median, _rounds(ranks)), strict=True))
        predicted = {name: planner.seconds(one) for name, one in others.items()}
        found.append(
            {
                **case_figures(case.name, chosen.predicted_s, seconds, predicted),
                "chosen": str(chosen.candidate),
                "because": list(chosen.because),
                "lengths": list(chosen.candidate.lengths),
            }
        )
    about = {"tokens": tokens, "layers": layers, "world_size": config.world_size, "threads": config.threads}
    return {**about, "repeats": repeats, "cases": found, "skipped": skipped}


def case_figures(
    name: str, predicted_s: float, seconds: dict[str, float], predicted: dict[str, float]
) -> dict[str, Any]:
    """The result of one case. `seconds`: measured, by plan, that of "chosen" among them; `predicted`: by plan, without
    that. `near`: how much slower the choice is than the best of all; `off`: how far the prediction is off."""
    best = min(seconds, key=seconds.__getitem__)
    return {
        "case": name,
        "chosen_s": seconds["chosen"],
        "predicted_s": predicted_s,
        "best": best,
        "best_s": seconds[best],
        "near": seconds["chosen"] / seconds[best] - 1,
        "off": predicted_s / seconds["chosen"] - 1,
        "swept": {plan: {"measured_s": seconds[plan], "predicted_s": predicted[plan]} for plan in predicted},
    }


@contextmanager
def _place(config: Config, case: PlannerCase) -> Iterator[tuple[Config, list[tuple[str, ...]]]]:
    """Where the ranks of a case run: here, or each on a host, with links of which one is slow."""
    if not case.link:
        yield config, []
        return
    with hosts(config.world_size) as network:
        for pair in permutations(range(config.world_size), 2):
            do(*network.slow(*pair, SLOW_LINK_BITS if pair == case.link else LINK_BITS))
        yield (
            config.with_(master_addr=network.address),
            [host.inside() for host in network.hosts],
        )


def _run(
    config: Config,
    case: PlannerCase,
    ids: Sequence[int],
    plans: Sequence[Plan],
    repeats: int,
    behind: Sequence[Sequence[str]],
) -> "list[RankLinks]":
    from dinfer.bench.link_rank import LinksJob, RankLinks

    texts, lengths = [plan.text() for plan in plans], () if plans else lengths_of(config.chunk_size)
    return run_ranks(
        "dinfer.bench.link_rank",
        config,
        lambda met: LinksJob(asdict(met), ids, texts, repeats, lengths, case.slow),
        RankLinks,
        behind,
    )


def _rounds(ranks: "Sequence[RankLinks]") -> Iterator[list[float]]:
    """By plan, the seconds of the slowest rank in each round."""
    for plans in zip(*(rank.plans for rank in ranks), strict=True):
        yield [max(of_round) for of_round in zip(*(one.seconds for one in plans), strict=True)]


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    rows = [
        [
            one["case"],
            *(f"{one[name]:.3f}" for name in ("chosen_s", "predicted_s")),
            f"{one['off']:+.1%}",
            f"{one['best_s']:.3f}",
            f"{one['near']:+.1%}",
            one["best"],
        ]
        for one in result["cases"]
    ]
    columns = ("machine", "chosen s", "predicted s", "off", "best s", "slower", "best of the sweep")
    lines = [
        f"prefill of {result['tokens']:,} tokens, {result['layers']} layers, {result['world_size']} ranks, threads "
        f"each: {result['threads']}; medians of {result['repeats']}, in turn",
        str(Table(columns, rows)),
        f"targets: slower by at most {NEAR:.0%}, the prediction off by at most {CLOSE:.0%}",
    ]
    for one in result["cases"]:
        lines += [f"{one['case']}:", *(f"  {sentence}" for sentence in one["because"])]
    lines += [f"left out: {name}: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines)

"""`dinfer bench planner`: the plan that the planner chooses beside a sweep of others and rules of other engines, all
timed on the same ranks, on even and on uneven machines.

Each case measures its machine, chooses, and runs every plan in turn. A slow rank runs each layer twice. A slow link is
limited in the network (`lab.hosts`), which needs root; without, payloads are kept back as long (`bench.paced`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import permutations
from statistics import median
from textwrap import indent
from typing import TYPE_CHECKING, Any, NamedTuple

from dinfer.bench.links import machine_of
from dinfer.bench.prefill import BenchModel, prompt_of, run_ranks
from dinfer.config import Config, ConfigError
from dinfer.display import Table
from dinfer.lab.hosts import do, hosts, why_not
from dinfer.plan.plan import Plan
from dinfer.planner.choose import (
    CHOICES,
    SMALLEST,
    Candidate,
    Planner,
    even_starts,
    quadratic_lengths,
    sized_lengths,
)
from dinfer.run.prediction import HEADS, figures_beside, predicted_figures, rows_beside
from dinfer.trace.trace import Trace

if TYPE_CHECKING:
    from dinfer.bench.link_rank import RankLinks, TimedPlan

SLOW_LINK_BITS, LINK_BITS = 50_000_000, 500_000_000
"""bits per second of the slow link, a tenth of the others"""

NEAR, CLOSE = 0.05, 0.10
"""targets: the choice within so much of the best of the sweep, the prediction within so much of what was measured"""

MODEL, TOKENS = BenchModel(hidden_size=512, heads=8, kv_heads=2, head_dim=64, intermediate_size=1536), 768
"""by default: three times up to 20 plans, each run four times, in less than four minutes on two cores"""

CHOSEN = "chosen"


class PlannerCase(NamedTuple):
    """A machine: the factor by which each rank is slower (empty: none is), and the slow link, if links are limited."""

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
    ranks' speed; both strategies; and the quadratic rule with half of its smoothing. Of candidates with the same plan
    only the first."""
    tokens, chunk_size = sum(default.lengths), max(default.lengths)
    sizes = sorted({min(tokens, max(SMALLEST, chunk_size * n // 4)) for n in (1, 2, 4, 8, 16)})
    splits = {"equal layers": default.starts, "layers by speed": planner.balanced(default.lengths)}
    found = dict[str, Candidate]()
    for split, starts in splits.items():
        for strategy in ("pairwise", "ring"):
            for size in sizes:
                lengths = sized_lengths(tokens, size)
                found[f"{split}, {strategy}, by {size}"] = Candidate(starts, lengths, "pipelined", strategy)
    quadratic = quadratic_lengths(tokens, min(tokens, 2 * chunk_size))
    found["equal layers, pairwise, quadratic rule"] = Candidate(
        default.starts, quadratic, "pipelined", "pairwise"
    )
    first = dict[tuple[object, ...], str]()
    for name, one in found.items():
        first.setdefault(planner.lanes(one), name)
    return {name: found[name] for name in first.values()}


class CasePlace(NamedTuple):
    """Where the ranks of a case run. `behind`: by rank, the command that runs it on its host; `pace`: links to slow
    down without hosts; `how`: what limits the links, in words."""

    config: Config
    behind: list[tuple[str, ...]]
    pace: list[tuple[int, int, float]]
    how: str = ""


def bench_planner(
    config: Config, vocab_size: int, layers: int, tokens: int, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """All cases. Raises RuntimeError."""
    ids, found = prompt_of(tokens, vocab_size), list[dict[str, Any]]()
    for case in cases_of(config.world_size):
        with _place(config, case) as place:
            say(f"{case.name}: layers and links are measured")
            machine = machine_of(_run(place, case, ids, [], 0))
            planner = Planner(machine, layers)
            default = Candidate(
                even_starts(layers, config.world_size),
                sized_lengths(tokens, config.chunk_size),
                "pipelined",
                "pairwise",
            )
            chosen = planner.choose(default, CHOICES)
            others = candidates_of(planner, default)
            plans = {CHOSEN: chosen.candidate, **others}
            say(f"{case.name}: {len(plans)} plans, {repeats} rounds")
            ranks = _run(place, case, ids, [one.plan(layers) for one in plans.values()], repeats)
        figures = dict(
            zip(plans, map(_figures, zip(*(rank.plans for rank in ranks), strict=True)), strict=True)
        )
        swept = {name: {**figures[name], "predicted_s": planner.seconds(one)} for name, one in others.items()}
        took = [rank.plans[0] for rank in ranks]
        beside = figures_beside(
            predicted_figures(chosen.candidate.plan(layers), machine),
            Trace.merge([one.events for one in took]),
        )
        found.append(
            {
                **case_figures(case.name, chosen.predicted_s, figures[CHOSEN], swept),
                "chosen": str(chosen.candidate),
                "because": list(chosen.because),
                "lengths": list(chosen.candidate.lengths),
                "links": place.how,
                "beside": {name: {"predicted_s": a, "measured_s": b} for name, a, b in beside},
                "machine": machine.as_dict(),
            }
        )
    about = {"tokens": tokens, "layers": layers, "world_size": config.world_size, "threads": config.threads}
    return {**about, "repeats": repeats, "cases": found}


def case_figures(
    name: str, predicted_s: float, chosen: dict[str, Any], swept: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The result of one case. `chosen`, and each of `swept`: `measured_s`; those of the sweep also `predicted_s`.
    `near`: how much slower the choice is than the best of all; `off`: how far the prediction is off."""
    seconds = {CHOSEN: chosen["measured_s"], **{plan: one["measured_s"] for plan, one in swept.items()}}
    best = min(seconds, key=seconds.__getitem__)
    return {
        "case": name,
        "chosen_s": seconds[CHOSEN],
        "rounds_s": chosen["rounds_s"],
        "predicted_s": predicted_s,
        "best": best,
        "best_s": seconds[best],
        "near": seconds[CHOSEN] / seconds[best] - 1,
        "off": predicted_s / seconds[CHOSEN] - 1,
        "swept": swept,
    }


@contextmanager
def _place(config: Config, case: PlannerCase) -> Iterator[CasePlace]:
    """Where the ranks of a case run: here, or each on a host, with links of which one is slow."""
    if not case.link:
        yield CasePlace(config, [], [])
        return
    bits = {
        pair: SLOW_LINK_BITS if pair == case.link else LINK_BITS
        for pair in permutations(range(config.world_size), 2)
    }
    speeds = f"{SLOW_LINK_BITS / 1e6:g} and {LINK_BITS / 1e6:g} Mbit/s"
    if reason := why_not():
        how = f"{speeds}: payloads are kept back by dinfer, since {reason}"
        yield CasePlace(config, [], [(*pair, one / 8) for pair, one in bits.items()], how)
        return
    with hosts(config.world_size) as network:
        for pair, one in bits.items():
            do(*network.slow(*pair, one))
        placed, behind = config.with_(master_addr=network.address), [one.inside() for one in network.hosts]
        yield CasePlace(
            placed, behind, [], f"{speeds}: each rank on a host of its own, in a network namespace"
        )


def _run(
    place: CasePlace, case: PlannerCase, ids: Sequence[int], plans: Sequence[Plan], repeats: int
) -> "list[RankLinks]":
    from dinfer.bench.link_rank import LinksJob, RankLinks

    texts, lengths = [plan.text() for plan in plans], () if plans else swept_lengths(place.config.chunk_size)
    return run_ranks(
        "dinfer.bench.link_rank",
        place.config,
        lambda met: LinksJob(asdict(met), ids, texts, repeats, lengths, case.slow, pace=place.pace),
        RankLinks,
        place.behind,
    )


def swept_lengths(chunk_size: int) -> list[int]:
    """The chunk lengths whose layer times are measured: those of the sweep."""
    return sorted({max(SMALLEST, chunk_size * n // 4) for n in (1, 2, 4, 8, 16)})


def _figures(ranks: "Sequence[TimedPlan]") -> dict[str, Any]:
    """Of one plan: the seconds of the slowest rank in each round, and their median."""
    rounds = [max(of_round) for of_round in zip(*(one.seconds for one in ranks), strict=True)]
    return {"measured_s": median(rounds), "rounds_s": rounds}


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
        if one["links"]:
            lines.append(f"  links of {one['links']}")
        figures = [(name, its["predicted_s"], its["measured_s"]) for name, its in one["beside"].items()]
        lines.append(indent(str(Table(HEADS, rows_beside(figures))), "  "))
    return "\n".join(lines)

"""What `session.measure` returns, and which plan `session.prefill(…, schedule="auto", …)` takes by it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dinfer.config import Config, ConfigError
from dinfer.display import Displayable, Table, Tidy
from dinfer.job import Job
from dinfer.messages import Holdings, RankMeasured
from dinfer.planner.choose import CHOICES, Candidate, Chosen, Planner, sized_lengths
from dinfer.planner.costs import LayerTime, fit
from dinfer.planner.machine import Links, LinkSpeed, MeasuredMachine, unmeasured
from dinfer.planner.ranks import ranks_told
from dinfer.tabular import TableRow, Tabular

AUTO = "auto"

TOKENS, LENGTHS, LINK_TOKENS = 2048, (32, 64, 128, 256, 512), 128
"""what is measured: layers at positions up to so many tokens, for chunks of these lengths; links by blocks of so many
tokens"""


@dataclass(frozen=True, repr=False)
class Measurement(Tidy, Tabular, Displayable):
    """What layers and links take on these ranks. `machine`: all of it, for `dinfer.planner`; `tokens`: the positions up
    to which layers were timed."""

    machine: MeasuredMachine
    tokens: int

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        """A row for each figure: seconds of a layer on a rank by position, and each link's latency and speeds."""
        machine, last = self.machine, max(0, self.tokens - LINK_TOKENS)
        rows: list[TableRow] = [
            [
                f"rank {rank}",
                f"seconds of a layer, {LINK_TOKENS} tokens at {at}",
                cost.seconds(at, LINK_TOKENS),
            ]
            for rank, cost in enumerate(machine.layers)
            for at in (0, last)
        ]
        for one in machine.links.speeds:
            figures = {
                "latency, s": one.latency_s,
                "alone, bytes/s": one.alone,
                "all busy, bytes/s": one.together,
            }
            rows += [[f"link {one.source}→{one.target}", name, value] for name, value in figures.items()]
        return ["of", "figure", "value"], rows

    def __str__(self) -> str:
        machine, last = self.machine, max(0, self.tokens - LINK_TOKENS)
        layers = Table(
            ("rank", f"a layer, {LINK_TOKENS} tokens at 0", f"at {last:,}"),
            [
                [rank, *(f"{cost.seconds(at, LINK_TOKENS) * 1e3:.2f} ms" for at in (0, last))]
                for rank, cost in enumerate(machine.layers)
            ],
        )
        links = Table(
            ("link", "latency", "alone MB/s", "all busy MB/s"),
            [
                [
                    f"{one.source}→{one.target}",
                    f"{one.latency_s * 1e3:.2f} ms",
                    f"{one.alone / 1e6:.1f}",
                    f"{one.together / 1e6:.1f}",
                ]
                for one in machine.links.speeds
            ],
        )
        return f"{layers}\n{links}" if machine.links.speeds else str(layers)


def measured(answers: Mapping[int, RankMeasured], tokens: int) -> Measurement:
    """The measurement of all ranks, from the answer of each."""
    costs = tuple(fit([LayerTime(*time) for time in answers[rank].layers]) for rank in sorted(answers))
    first = answers[0]
    links = Links(tuple(LinkSpeed(*link) for link in first.links))
    return Measurement(MeasuredMachine(costs, links, first.hidden_bytes, first.block_bytes), tokens)


def measured_before(held: Sequence[Holdings]) -> dict[bool, Measurement]:
    """What an earlier session has measured on these ranks, all of them at once; by whether digests were computed."""
    found = dict[bool, Measurement]()
    for digests, _, _ in held[0].measured:
        kept = [(tokens, one) for rank in held for of, tokens, one in rank.measured if of == digests]
        if len(kept) == len(held) and len({(tokens, one.links) for tokens, one in kept}) == 1:
            found[digests] = measured(dict(enumerate(one for _, one in kept)), kept[0][0])
    return found


def without_auto(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A run's parameters without those that are to be chosen, and the names of these."""
    auto = [name for name in CHOICES if isinstance(parameters.get(name), str) and parameters[name] == AUTO]
    return {name: value for name, value in parameters.items() if name not in auto}, auto


def check_auto(config: Config, auto: Sequence[str]) -> None:
    """Raises ConfigError where what is `auto` cannot be chosen, since runs of this config are not measured."""
    if auto and (found := unmeasured(config)):
        raise ConfigError(
            f"{auto[0]} is auto, which needs {found.name} {found.value}: {found.why}. Give a value, or {found.remedy}."
        )


def choose(measurement: Measurement, job: Job, auto: Sequence[str]) -> Chosen:
    """The fastest plan for this job's prompt that differs from its own only in what is `auto`; see `check_auto`. Its
    sentences end with one on the number of ranks."""
    config, shape = job.config, job.plan.shape
    default = Candidate(
        shape.starts, sized_lengths(shape.tokens, config.chunk_size), config.schedule, config.sync_strategy
    )
    planner = Planner(measurement.machine, shape.layers)
    chosen = planner.choose(default, auto)
    told = ranks_told(planner, chosen, auto)
    return replace(chosen, because=(*chosen.because, told)) if told else chosen


def with_choice(config: Config, chosen: Chosen, layers: int) -> tuple[Config, str]:
    """The config of the chosen plan, and the plan's text if no config can say it: chunks of different lengths."""
    found = chosen.candidate
    shape = found.shape(layers)
    config = config.with_(
        schedule=found.schedule,
        sync_strategy=found.sync_strategy,
        layer_split=found.starts[1:],
        chunk_size=shape.chunk_size,
    )
    return config, found.plan(layers).text() if shape.lengths else ""

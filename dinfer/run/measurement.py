"""What `session.measure` returns, and which plan a run takes by it whose parameters are `auto`: in a session, or by
`dinfer run`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dinfer.config import Config
from dinfer.display import Displayable, Table, Tidy
from dinfer.job import Job, prepare_loaded
from dinfer.messages import Holdings, MeasureRank, RankMeasured
from dinfer.plan.lower import lower
from dinfer.plan.partition import Shape
from dinfer.planner.choose import CHOICES, SLACK, Candidate, Chosen, Planner, sized_lengths
from dinfer.planner.costs import LayerTime, as_in_run, fit
from dinfer.planner.machine import CodecCost, Links, LinkSpeed, MeasuredMachine
from dinfer.planner.ranks import ranks_told
from dinfer.tabular import TableRow, Tabular

AUTO = "auto"

AUTOS = (*CHOICES, "codec")
"""the parameters that may be AUTO"""

LOSSLESS: tuple[str, ...] = ("none", "lossless")
"""codecs that may be chosen: never one that loses anything, unless it was asked for"""

TOKENS, LENGTHS, GRAPH_LENGTHS, LINK_TOKENS = 2048, (32, 64, 128, 256, 512), (64, 128, 256), 128
"""what is measured: layers at positions up to so many tokens, for chunks of these lengths, or those with graphs; links
by blocks of so many tokens"""


@dataclass(frozen=True, repr=False)
class Measurement(Tidy, Tabular, Displayable):
    """What layers and links take on these ranks. `machine`: all of it, for `dinfer.planner`; `tokens`: the positions up
    to which layers were timed; `kernels`: of runs that asked for these."""

    machine: MeasuredMachine
    tokens: int
    kernels: str = "exact"

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
        codecs = Table(
            ("codec", "bytes of KV", f"encode, {LINK_TOKENS} tokens", "decode"),
            [
                [one.name, f"1/{1 / one.ratio:.2f}", *(f"{s * LINK_TOKENS * 1e3:.2f} ms" for s in one[2:])]
                for one in machine.codecs
                if one.name != "none"
            ],
        )
        return "\n".join(map(str, [layers, links, codecs] if machine.links.speeds else [layers]))


def kernels_asked(config: Config) -> str:
    """The kernels that a run asks for: "exact" on a CPU, whatever the config says."""
    return config.kernels if config.wants_graphs else "exact"


def to_measure(tokens: int, config: Config) -> MeasureRank:
    """What ranks are to measure for prompts of up to so many tokens, in runs of this config, whose backend is
    chosen. Each length takes graphs of its own, so of these there are fewer."""
    lengths = GRAPH_LENGTHS if config.wants_graphs else LENGTHS
    fitting = tuple(length for length in lengths if length <= tokens) or (tokens,)
    kernels: Any = kernels_asked(config)
    backend: Any = config.backend
    return MeasureRank(tokens, fitting, min(LINK_TOKENS, tokens), config.digests, kernels, backend)


def run_to_measure(job: Job) -> MeasureRank:
    """What the ranks of one run are to measure: as much as its prompt needs."""
    return to_measure(min(TOKENS, len(job.ids)), job.config)


def measured(answers: Mapping[int, RankMeasured], tokens: int) -> Measurement:
    """The measurement of all ranks, from the answer of each."""
    costs = tuple(
        as_in_run(
            fit([LayerTime(*time) for time in answers[rank].layers]),
            [LayerTime(*time) for time in answers[rank].in_run],
        )
        for rank in sorted(answers)
    )
    first = answers[0]
    links = Links(tuple(LinkSpeed(*link) for link in first.links), hidden_first=not first.streams)
    codecs = tuple(CodecCost(*one) for one in first.codecs)
    machine = MeasuredMachine(
        costs, links, first.hidden_bytes, first.block_bytes,
        codecs=codecs, padded=first.padded, streams=first.streams,
    )  # fmt: skip
    return Measurement(machine, tokens, first.asked)


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
    auto = [name for name in AUTOS if isinstance(parameters.get(name), str) and parameters[name] == AUTO]
    return {name: value for name, value in parameters.items() if name not in auto}, auto


def choose(machine: MeasuredMachine, config: Config, shape: Shape, auto: Sequence[str]) -> Chosen:
    """The fastest plan for a prompt of this shape that differs from the config's only in what is `auto`. Its sentences
    end with one on the number of ranks. `codec` is set only where it is chosen, among LOSSLESS, and none on streams.
    Raises PlanError where another number of ranks was measured."""
    default = Candidate(
        shape.starts, sized_lengths(shape.tokens, config.chunk_size), config.schedule, config.sync_strategy
    )
    free = [name for name in auto if name in CHOICES]
    known = set() if machine.streams else {one.name for one in machine.codecs}
    codecs = [one for one in LOSSLESS if one == "none" or one in known] if "codec" in auto else [config.codec]
    found = []
    for codec in codecs:
        planner = Planner(replace(machine, codec=codec), shape.layers)
        found.append((planner, planner.choose(default, free)))
    planner, chosen = min(found, key=lambda one: one[1].predicted_s * (1 + SLACK * (one is not found[0])))
    because = [*chosen.because]
    if "codec" in auto:
        chosen = replace(chosen, codec=planner.machine.codec)
        because.append(_codec_told({one.machine.codec: its.predicted_s for one, its in found}, chosen))
    if free:
        because += [told for told in [ranks_told(planner, chosen, free)] if told]
    return replace(chosen, because=tuple(because))


def _codec_told(seconds: Mapping[str, float], chosen: Chosen) -> str:
    """Why this codec was chosen, of those in `seconds`."""
    lossy = "lossy ones are never chosen unasked"
    others = [f"{name} {took:.4g} s" for name, took in seconds.items() if name != chosen.codec]
    if len(chosen.candidate.starts) == 1:
        return "codec none: with one rank nothing is sent."
    if not others:
        return f"codec none: the lossless one is for bfloat16, and {lossy}."
    return f"codec {chosen.codec}: it takes {seconds[chosen.codec]:.4g} s, {', '.join(others)}; {lossy}."


class ChosenJob(NamedTuple):
    """A run whose parameters were chosen. `parameters`: these, as a config has them; `plan`: the plan's text if no
    config can say it, since its chunks have different lengths, else ""."""

    job: Job
    parameters: dict[str, Any]
    plan: str
    chosen: Chosen


def chosen_job(job: Job, measurement: Measurement, auto: Sequence[str]) -> ChosenJob:
    """The job with what is `auto` chosen by the measurement; see `choose`."""
    chosen = choose(measurement.machine, job.config, job.plan.shape, auto)
    found, layers = chosen.candidate, job.plan.shape.layers
    shape = found.shape(layers)
    parameters: dict[str, Any] = {
        "schedule": found.schedule,
        "sync_strategy": found.sync_strategy,
        "layer_split": found.starts[1:],
        "chunk_size": shape.chunk_size,
        "codec": chosen.codec or job.config.codec,
    }
    plan = ""
    if shape.lengths:  # which no config can say
        built = found.plan(layers)
        plan = (lower(built) if job.config.uses_streams else built).text()
    made = prepare_loaded(job.config.with_(**parameters), job.spec, plan or None)
    made = replace(made, predicted_s=chosen.predicted_s, because=chosen.because)
    return ChosenJob(predictable(made, measurement), parameters, plan, chosen)


def predictable(job: Job, measurement: Measurement | None) -> Job:
    """The job with the machine as measured, by which its times are predicted, where that tells of such runs."""
    if measurement is None or measurement.kernels != kernels_asked(job.config):
        return job
    return replace(job, machine=replace(measurement.machine, codec=job.config.codec))

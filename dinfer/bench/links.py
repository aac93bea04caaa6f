"""`dinfer bench links`: prefill over links of a given speed, one rank a host, beside what the plan takes in simulation.

Hosts are network namespaces of this machine (`lab.hosts`), each with one interface that is limited in both directions.
Two simulations of the very plan that ran: with the cost of layers fitted and links measured before (`predicted_s`); and
with each layer's time as measured in the run, on the same links (`makespan_s`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Any

from dinfer.bench.prefill import prompt_of, run_ranks
from dinfer.config import Config, ConfigError, Schedule, SyncStrategy
from dinfer.display import Table
from dinfer.lab.hosts import do, hosts, why_not
from dinfer.plan.graph import Graph
from dinfer.plan.ops import parse_op
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.plan.timing import timed
from dinfer.planner.costs import as_in_run, fit
from dinfer.planner.machine import Links, MeasuredMachine
from dinfer.trace.intervals import common, length, union
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import Transfer, transfers

if TYPE_CHECKING:
    from dinfer.bench.link_rank import RankLinks

RATES = "10gbit,1gbit,100mbit"

UNITS = {"mbit": 1e6, "gbit": 1e9}

TARGET = 0.05
"""how far a measured prefill may be from the simulation of its plan"""


def rate_of(text: str) -> int:
    """Bits per second of a rate such as `1gbit` or `100mbit`. Raises ConfigError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(mbit|gbit)", text.strip().lower())
    bits = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 1e6 <= bits <= 1e11:
        raise ConfigError(
            f"rate is {text!r}; it must be a number with mbit or gbit, from 1mbit to 100gbit, such as 1gbit."
        )
    return int(bits)


def codecs_of(text: str) -> list[str]:
    """The codecs of a list such as `none,int8,k=int8+v=fp8`, in which + stands for a codec's own comma. Raises
    ConfigError."""
    return [Config.of({"codec": one.replace("+", ",")}).codec for one in text.split(",")]


def check_asked(config: Config, rates: Sequence[str]) -> None:
    """Raises ConfigError for rates that there are not, and, in one sentence, where no hosts can be made."""
    if not rates:
        raise ConfigError(f"rate is empty; give one or several, such as {RATES}.")
    for rate in rates:
        rate_of(rate)
    if config.world_size < 2:
        raise ConfigError(f"hosts is {config.world_size}; links need at least 2.")
    if reason := why_not():
        raise ConfigError(
            f"bench links needs hosts of its own, which cannot be made here: {reason}. Run it as root where iproute2 "
            "is, or dinfer bench prefill, which needs no hosts."
        )


CASES: tuple[tuple[SyncStrategy, Schedule], ...] = tuple(
    product(("pairwise", "ring"), ("pipelined", "lockstep"))
)


def bench_links(
    config: Config,
    vocab_size: int,
    layers: int,
    tokens: int,
    rates: Sequence[str],
    repeats: int,
    codecs: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Time every strategy and schedule by every codec at every rate, on new hosts. Raises RuntimeError (HostsError
    too)."""
    limits = {rate: rate_of(rate) for rate in rates}
    shape = partition(
        layers=layers, tokens=tokens, world_size=config.world_size, chunk_size=config.chunk_size
    )
    cases = [(build(shape, schedule, strategy), codec) for strategy, schedule in CASES for codec in codecs]
    result: dict[str, Any] = {
        "tokens": tokens,
        "chunk_size": config.chunk_size,
        "layers": layers,
        "dtype": config.dtype,
        "threads": config.threads,
        "repeats": repeats,
        "cells": [],
        "machines": {},
    }
    with hosts(config.world_size, wires=False) as network:
        for rate, bits in limits.items():
            for n in range(config.world_size):
                for command in network.limit(n, bits):
                    do(*command)
            say(f"{rate}: {config.world_size} hosts")
            ranks = _run(
                config.with_(master_addr=network.address),
                prompt_of(tokens, vocab_size),
                cases,
                repeats,
                [host.inside() for host in network.hosts],
            )
            machine = machine_of(ranks)
            result["machines"][rate] = machine.as_dict()
            result["cells"] += [
                {"rate": rate, "hosts": config.world_size, **cell(plan, codec, ranks, n, machine)}
                for n, (plan, codec) in enumerate(cases)
            ]
    return result


def _run(
    config: Config,
    ids: Sequence[int],
    cases: Sequence[tuple[Plan, str]],
    repeats: int,
    behind: Sequence[Sequence[str]],
) -> "list[RankLinks]":
    from dinfer.bench.link_rank import LinksJob, RankLinks

    texts, codecs = [plan.text() for plan, _ in cases], [codec for _, codec in cases]
    lengths = lengths_of(config.chunk_size)
    return run_ranks(
        "dinfer.bench.link_rank",
        config,
        lambda met: LinksJob(asdict(met), ids, texts, repeats, lengths, codecs=codecs),
        RankLinks,
        behind,
    )


def lengths_of(chunk_size: int) -> list[int]:
    """The chunk lengths whose layer times are measured."""
    return sorted({max(1, chunk_size // 4), max(1, chunk_size // 2), chunk_size, 2 * chunk_size})


def machine_of(ranks: "Sequence[RankLinks]") -> MeasuredMachine:
    """The machine that these ranks have measured."""
    found = [rank.measured for rank in ranks if rank.measured]
    first = found[0]
    costs = tuple(as_in_run(fit(one.layers), one.in_run) for one in found)
    links = Links(tuple(first.links))
    return MeasuredMachine(costs, links, first.hidden_bytes, first.block_bytes, codecs=tuple(first.codecs))


def cell(
    plan: Plan, codec: str, ranks: "Sequence[RankLinks]", number: int, machine: MeasuredMachine
) -> dict[str, Any]:
    """The figures of one plan: measured, predicted, and simulated with the layer times of the run itself. Bytes are
    those of all payloads: as planned, and as sent."""
    machine = replace(machine, codec=codec)
    took = [rank.plans[number] for rank in ranks]
    rounds = [max(of_round) for of_round in zip(*(one.seconds for one in took), strict=True)]
    known = {(n, parse_op(op)): seconds for n, one in enumerate(took) for op, seconds in one.computed}
    graph = Graph(plan)
    makespan_s = timed(graph, replace(machine, measured=known)).makespan
    measured_s = median(rounds)
    trace = Trace.merge([one.events for one in took])
    return {
        "strategy": plan.sync_strategy,
        "schedule": plan.schedule,
        "codec": codec,
        "planned_bytes": sum(machine.message(op) for op in graph.ops if op.kind == "send"),
        "sent_bytes": sum(one.bytes for one in transfers(trace)),
        "measured_s": measured_s,
        "rounds_s": rounds,
        "predicted_s": timed(graph, machine).makespan,
        "makespan_s": makespan_s,
        "over_makespan": measured_s / makespan_s - 1,
        "same_kv": len({one.sha256 for one in took}) == 1,
        "hidden": hidden_figures(transfers(trace), machine.links),
    }


def hidden_figures(found: Sequence[Transfer], links: Links) -> dict[str, float]:
    """How long hidden states travelled, seconds in all: `wire_s`; `alone_s`: what the same take on quiet links;
    `beside_kv_s`: the part of `wire_s` in which blocks travelled from the same source or to the same target."""
    wire = alone = beside = 0.0
    for one in found:
        if one.what != "hidden":
            continue
        link = links.by_link[one.link]
        blocks = union(
            (other.met, other.end)
            for other in found
            if other.what == "kv" and (other.source == one.source or other.target == one.target)
        )
        wire += one.wire / 1e9
        alone += link.latency_s + one.bytes / link.alone
        beside += length(common([(one.met, one.end)], blocks)) / 1e9
    return {"wire_s": wire, "alone_s": alone, "beside_kv_s": beside}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    rows = [
        [
            one["rate"],
            one["strategy"],
            one["schedule"],
            one["codec"],
            f"{one['sent_bytes'] / 1e6:.1f}",
            *(f"{one[name]:.3f}" for name in ("measured_s", "makespan_s")),
            f"{one['over_makespan']:+.1%}",
            f"{one['predicted_s']:.3f}",
            f"{one['hidden']['wire_s'] / max(one['hidden']['alone_s'], 1e-9):.2f}",
        ]
        for one in result["cells"]
    ]
    columns = (
        "rate",
        "strategy",
        "schedule",
        "codec",
        "MB",
        "measured s",
        "simulated s",
        "over",
        "predicted s",
        "hidden",
    )
    return (
        f"prefill of {result['tokens']:,} tokens in chunks of {result['chunk_size']}, {result['layers']} layers, one "
        f"rank on each of {result['cells'][0]['hosts']} hosts, threads each: {result['threads']}; medians of "
        f"{result['repeats']}\n"
        f"{Table(columns, rows)}\n"
        f"simulated: the same plan, with layer times as measured in these runs and links as measured before (target: "
        f"within {TARGET:.0%}); predicted: with layer costs fitted before; hidden: time of hidden states on the wire, "
        f"over that on quiet links"
    )

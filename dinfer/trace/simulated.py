"""A simulated trace: how long a plan takes if every op takes a given time. For benches, previews and tests.

Nothing is run. Messages do not share bandwidth.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from dinfer.plan.graph import NONE, Graph, simulate
from dinfer.plan.plan import Plan
from dinfer.trace.events import event_of
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import LinkRanks


@dataclass(frozen=True)
class Machine:
    """How long ops take, in nanoseconds; embed and norm take a twentieth of a layer's time. `slow`: by link, the factor
    by which it is slower than the others. Each op takes longer by a share of up to `jitter`, drawn from `seed`."""

    layer: int = 5_000_000
    latency: int = 150_000
    bytes_per_token: int = 4096
    bytes_per_s: float = 1e9
    slow: Mapping[LinkRanks, float] = field(default_factory=dict)
    jitter: float = 0.2
    seed: int = 0


def paper_trace(plan: Plan, machine: Machine | None = None) -> Trace:
    """The events of a plan, from time 0 on, with sends that wait for their recv. The plan must not deadlock so."""
    graph, machine = Graph(plan), machine or Machine()
    random = Random(machine.seed)
    ends = [0] * len(graph.ops)
    events = []
    for number in simulate(graph, rendezvous=True).order:
        if ends[number]:  # with its partner: a send and its recv end together
            continue
        op, rank, partner = graph.ops[number], graph.ranks[number], graph.partner[number]
        size = op.tokens * machine.bytes_per_token
        if op.is_transfer:
            link = (rank, op.peer) if op.kind == "send" else (op.peer, rank)
            base = (machine.latency + size / machine.bytes_per_s * 1e9) * machine.slow.get(link, 1)
        else:
            base = machine.layer if op.kind == "layer" else machine.layer / 20
        pair = [number] if partner == NONE else [number, partner]
        ready = [0 if graph.before[one] == NONE else ends[graph.before[one]] for one in pair]
        made = [[ends[dep] for dep in graph.deps[one] if dep != NONE] for one in pair]
        start = [max(before, *needs) if needs else before for before, needs in zip(ready, made, strict=True)]
        met = max(start)
        end = met + max(1, round(base * (1 + machine.jitter * random.random())))
        for one, before, begun in zip(pair, ready, start, strict=True):
            ends[one] = end
            place = graph.place(one)
            lane = plan.lanes[place.rank][place.lane].name
            times = (before, begun, met, end)
            events.append(event_of(graph.ops[one], place.rank, lane, place.index, times, size))
    shape = plan.shape
    return Trace.merge(
        [events],
        model="on paper",
        layers=shape.layers,
        tokens=shape.tokens,
        chunk_size=shape.chunk_size,
        stages=list(shape.starts),
        schedule=plan.schedule,
        sync_strategy=plan.sync_strategy,
        world_size=shape.world_size,
        plan_id=f"{plan.id:016x}",
    )

"""A simulated trace: how long a plan takes if every op takes a given time. For benches, previews and tests.

Nothing is run. Messages do not share bandwidth.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from dinfer.plan.graph import NONE, Graph, simulate
from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan
from dinfer.trace.events import Event, event_of
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import LinkRanks

SHORT = 20
"""embed and norm take a layer's time divided by this"""


@dataclass(frozen=True)
class Machine:
    """How long ops take, in nanoseconds. `slow`: by link, the factor by which it is slower than the others. Each op
    takes longer by a share of up to `jitter`, drawn from `seed`."""

    layer: int = 5_000_000
    latency: int = 150_000
    bytes_per_token: int = 4096
    bytes_per_s: float = 1e9
    slow: Mapping[LinkRanks, float] = field(default_factory=dict)
    jitter: float = 0.2
    seed: int = 0


def paper_trace(plan: Plan, machine: Machine | None = None) -> Trace:
    """The events of a plan, from time 0 on, with sends that wait for their recv. The plan must not deadlock so."""
    graph = Graph(plan)
    clock = _Clock(graph, machine or Machine())
    for number in simulate(graph, rendezvous=True).order:
        clock.do(number)
    shape = plan.shape
    return Trace.merge(
        [clock.events],
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


class _Clock:
    """When each op of a plan is ready, starts and ends."""

    def __init__(self, graph: Graph, machine: Machine) -> None:
        self.events: list[Event] = []
        self._graph, self._machine = graph, machine
        self._random = Random(machine.seed)
        self._ends = [0] * len(graph.ops)

    def do(self, number: int) -> None:
        """End an op whose inputs are there; a send and its recv end together."""
        peer = self._graph.partner[number]
        pair = [number] if peer == NONE else [number, peer]
        if self._ends[number]:
            return
        met = max(self._start(one) for one in pair)
        end = met + self._duration(self._graph.ranks[number], self._graph.ops[number])
        for one in pair:
            self._ends[one] = end
            self.events.append(self._event(one, met, end))

    def _before(self, number: int) -> int:
        before = self._graph.before[number]
        return 0 if before == NONE else self._ends[before]

    def _start(self, number: int) -> int:
        made = (self._ends[dep] for dep in self._graph.deps[number] if dep != NONE)
        return max(self._before(number), max(made, default=0))

    def _bytes(self, op: Op) -> int:
        return op.tokens * self._machine.bytes_per_token

    def _duration(self, rank: int, op: Op) -> int:
        machine = self._machine
        if op.is_transfer:
            link = (rank, op.peer) if op.kind == "send" else (op.peer, rank)
            base = (machine.latency + self._bytes(op) / machine.bytes_per_s * 1e9) * machine.slow.get(link, 1)
        else:
            base = machine.layer if op.kind == "layer" else machine.layer / SHORT
        return max(1, round(base * (1 + machine.jitter * self._random.random())))

    def _event(self, number: int, met: int, end: int) -> Event:
        op, place = self._graph.ops[number], self._graph.place(number)
        lane = self._graph.plan.lanes[place.rank][place.lane].name
        times = self._before(number), self._start(number), met, end
        return event_of(op, place.rank, lane, place.index, times, self._bytes(op))

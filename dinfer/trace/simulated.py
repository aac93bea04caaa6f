"""A simulated trace: the events of a plan on a machine that is given as numbers. Nothing is run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from dinfer.plan.graph import Channel, Graph
from dinfer.plan.ops import Op
from dinfer.plan.partition import Shape
from dinfer.plan.plan import Plan
from dinfer.plan.timing import Timings, timed
from dinfer.trace.events import event_of
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import LinkRanks


@dataclass(frozen=True)
class Machine:
    """A machine on paper, for previews and tests: all ranks are alike, and messages do not share bandwidth. Times are
    nanoseconds; embed and norm take a twentieth of a layer's time. `slow`: by link, the factor by which it is slower
    than the others. Each op takes longer by a share of up to `jitter`, which its place and `seed` decide."""

    layer: int = 5_000_000
    latency_ns: int = 150_000
    bytes_per_token: int = 4096
    bytes_per_s: float = 1e9
    slow: Mapping[LinkRanks, float] = field(default_factory=dict)
    jitter: float = 0.2
    seed: int = 0

    def compute(self, rank: int, op: Op, _: Shape) -> float:
        base = self.layer if op.kind == "layer" else self.layer / 20
        return base * self._longer(rank, str(op)) / 1e9

    def message(self, op: Op) -> int:
        return op.tokens * self.bytes_per_token

    def coding(self, _: Op) -> tuple[float, float]:
        return 0.0, 0.0

    def latency(self, channel: Channel) -> float:
        return self.latency_ns * self._slower(channel) / 1e9

    def ahead(self, _: Channel) -> float:
        return 0.0

    def rates(self, moving: Sequence[Channel]) -> Sequence[float]:
        return [self.bytes_per_s / self._slower(channel) / self._longer(*channel) for channel in moving]

    def _slower(self, channel: Channel) -> float:
        return self.slow.get((channel.source, channel.target), 1)

    def _longer(self, *what: object) -> float:
        return 1 + self.jitter * Random(f"{self.seed} {what}").random()


def paper_trace(plan: Plan, machine: Timings | None = None) -> Trace:
    """The events of a plan, from time 0 on, with sends that wait for their recv. Raises PlanError if it hangs so."""
    graph, machine = Graph(plan), machine or Machine()
    events = []
    for number, times in enumerate(timed(graph, machine).times):
        op, place = graph.ops[number], graph.place(number)
        lane = plan.lanes[place.rank][place.lane].name
        ready, start, met, end = (round(time * 1e9) for time in times)
        at = ready, start, met, max(end, met + 1)
        events.append(event_of(op, place.rank, lane, place.index, at, machine.message(op)))
    shape = plan.shape
    return Trace.merge(
        [events],
        model="on paper",
        layers=shape.layers,
        tokens=shape.tokens,
        chunk_size=shape.chunk_size,
        **({"chunks": list(shape.lengths)} if shape.lengths else {}),
        stages=list(shape.starts),
        schedule=plan.schedule,
        sync_strategy=plan.sync_strategy,
        world_size=shape.world_size,
        plan_id=f"{plan.id:016x}",
    )

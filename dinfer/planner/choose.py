"""Choose a plan: by simulating each candidate on the measured machine, sync included, and taking the fastest.

Whatever is chosen, the plan that would run without a choice is a candidate too, so no choice is worse in simulation.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import ceil, inf
from typing import get_args

from dinfer.config import Schedule, SyncStrategy
from dinfer.display import numbers_text
from dinfer.plan.graph import Graph
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import Shape, partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.plan.timing import timed
from dinfer.planner.machine import MeasuredMachine

CHOICES = ("schedule", "chunk_size", "layer_split", "sync_strategy")
"""what can be chosen, in the order in which it is explained"""

SAFE: tuple[Schedule, ...] = ("pipelined", "lockstep")

GRAINS = 32
"""lengths of chunks are multiples of the prompt's 32nd part, or of SMALLEST if that is more"""

SMALLEST = 16
"""tokens of a chunk at least, unless the prompt has fewer: below, ops cost more than they hide"""

ROUNDS = 2
"""how often chunks and stages are improved in turn"""

IMPROVED = 2
"""of the pairs of schedule and strategy, those whose stages and chunks are improved: the fastest"""

SLACK = 0.002
"""a plan counts as faster only if it is so by this part, so that a simpler one is kept"""

OPS = 400_000
"""ops that one choice simulates, of three ranks, of more ranks fewer, since more messages travel at once: some seconds;
then the best so far is taken"""


@dataclass(frozen=True)
class Candidate:
    """A plan that could run. `lengths`: the tokens of each chunk."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    schedule: Schedule
    sync_strategy: SyncStrategy

    def __str__(self) -> str:
        chunks = (
            f"{len(self.lengths)} chunk{'s' * (len(self.lengths) > 1)} of up to {max(self.lengths)} tokens"
        )
        stages = f"stages from layer {numbers_text(self.starts)}"
        return f"{self.schedule}, {self.sync_strategy}, {stages}, {chunks}"

    def plan(self, layers: int) -> Plan:
        return build(self.shape(layers), self.schedule, self.sync_strategy)

    def shape(self, layers: int) -> Shape:
        return partition(
            layers=layers,
            tokens=sum(self.lengths),
            world_size=len(self.starts),
            chunk_size=max(self.lengths),
            layer_split=self.starts[1:],
            lengths=self.lengths,
        )


@dataclass(frozen=True)
class Chosen:
    """What was chosen, seconds by simulation, and a sentence for each choice. `default`: what would run without;
    `codec`: "" where none was to be chosen."""

    candidate: Candidate
    predicted_s: float
    default: Candidate
    default_s: float
    because: tuple[str, ...]
    codec: str = ""

    def __str__(self) -> str:
        return "\n".join(self.because)


class Planner:
    """Chooses for `layers` layers on this machine, with at most about `ops` ops simulated, as OPS counts them."""

    def __init__(self, machine: MeasuredMachine, layers: int, ops: int = OPS) -> None:
        self.machine, self.layers, self._ops = machine, layers, ops
        self._known: dict[Candidate, float] = {}
        self._used = 0
        """ops simulated so far, as OPS counts them"""

    def seconds(self, candidate: Candidate) -> float:
        """How long the candidate's plan takes by simulation."""
        if candidate not in self._known:
            graph = Graph(self.machine.as_run(candidate.plan(self.layers)))
            self._used += len(graph.ops) * len(candidate.starts) // 3
            self._known[candidate] = timed(graph, self.machine).makespan
        return self._known[candidate]

    def lanes(self, candidate: Candidate) -> tuple[object, ...]:
        """What is the same for candidates that run the same ops: with two ranks both strategies do."""
        plan = candidate.plan(self.layers)
        return plan.shape, plan.lanes

    def choose(self, default: Candidate, free: Iterable[str]) -> Chosen:
        """The fastest plan that differs from `default` only in what is `free`: any of CHOICES. Raises PlanError."""
        wanted = tuple(name for name in CHOICES if name in set(free))
        if unknown := set(free) - set(CHOICES):
            raise PlanError(f"{unknown.pop()!r} cannot be chosen; the choices are {', '.join(CHOICES)}.")
        if len(default.starts) != len(self.machine.layers):
            raise PlanError(
                f"{len(self.machine.layers)} ranks were measured, but the plan has {len(default.starts)}: measure "
                "again."
            )
        schedules = SAFE if "schedule" in wanted else (default.schedule,)
        strategies = get_args(SyncStrategy) if "sync_strategy" in wanted else (default.sync_strategy,)
        tried = [
            replace(default, schedule=schedule, sync_strategy=strategy)
            for schedule in schedules
            for strategy in strategies
        ]
        best = self._faster(default, tried)
        for start in sorted(tried, key=self.seconds)[:IMPROVED]:
            best = self._faster(best, [self._improved(start, wanted)])
        best = self._best_told(best, default, wanted)
        because = tuple(self._because(name, best, default) for name in wanted)
        return Chosen(best, self.seconds(best), default, self.seconds(default), because)

    def _improved(self, candidate: Candidate, wanted: Sequence[str]) -> Candidate:
        """The candidate with stages and chunks improved in turn, until neither helps."""
        for _ in range(ROUNDS):
            before = candidate
            if "layer_split" in wanted:
                candidate = self._with_stages(candidate)
            if "chunk_size" in wanted:
                candidate = self._with_chunks(candidate)
            if candidate == before:
                break
        return candidate

    def _faster(self, one: Candidate, others: Iterable[Candidate]) -> Candidate:
        """The fastest; of equals, the first. Looks at no more of them once its ops are used up."""
        best = one
        for other in others:
            if other not in self._known and self._used > self._ops:
                continue
            if self.seconds(other) < self.seconds(best) * (1 - SLACK):
                best = other
        return best

    # -- stages

    def _with_stages(self, candidate: Candidate) -> Candidate:
        """Stages in proportion to the ranks' speed, then moved by one layer as long as that helps."""
        best = self._faster(candidate, [replace(candidate, starts=self.balanced(candidate.lengths))])
        while True:
            moved = (
                replace(best, starts=starts)
                for n in range(1, len(best.starts))
                for step in (-1, 1)
                if _fits(starts := _moved(best.starts, n, step), self.layers)
            )
            better = self._faster(best, moved)
            if better == best:
                return best
            best = better

    def balanced(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """The first layers of stages of which the slowest takes least, compute alone."""
        costs = [self._prompt_s(rank, lengths) for rank in range(len(self.machine.layers))]
        counts = [1] * len(costs)
        for _ in range(self.layers - len(costs)):
            rank = min(range(len(costs)), key=lambda n: (counts[n] + 1) * costs[n])
            counts[rank] += 1
        return tuple(accumulate(counts[:-1], initial=0))

    def _prompt_s(self, rank: int, lengths: Sequence[int]) -> float:
        """Seconds of one layer for the whole prompt in these chunks."""
        starts = accumulate(lengths[:-1], initial=0)
        return sum(
            self.machine.layers[rank].seconds(start, length)
            for start, length in zip(starts, lengths, strict=True)
        )

    # -- chunks

    def _with_chunks(self, candidate: Candidate) -> Candidate:
        """The fastest of: even chunks of many sizes; chunks by dynamic programming; and the best of these with
        boundaries between neighbours moved as long as it helps."""
        tokens = sum(candidate.lengths)
        even = [even_lengths(tokens, count) for count in _counts(tokens)]
        best = self._faster(candidate, (replace(candidate, lengths=lengths) for lengths in even))
        planned = (replace(best, lengths=lengths) for lengths in self.programmed(best))
        return self._shifted(self._faster(best, planned))

    def programmed(self, candidate: Candidate) -> list[tuple[int, ...]]:
        """Chunks for which the slowest stage is never kept waiting by the length of one, found by dynamic programming.

        A pipeline takes as long as all of its chunks take on one stage, and the first or last chunk on the others. With
        a bound on what a chunk may take on its slowest stage (and its blocks on its slowest link), the least sum is
        found from the end of the prompt; each bound is one answer (as in Li et al., TeraPipe, 2021). The caller
        simulates them.
        """
        tokens = sum(candidate.lengths)
        grain = _grain(tokens)
        ends = sorted({*range(grain, tokens, grain), tokens} - set(range(tokens - grain + 1, tokens)))
        points = [0, *ends]
        times = {
            (a, b): self._chunk_s(candidate, points[a], points[b])
            for a in range(len(points))
            for b in range(a + 1, len(points))
        }
        found = list[tuple[int, ...]]()
        for bound in _spread(sorted(times.values()), BOUNDS):
            cuts = _cheapest(times, len(points), bound)
            if cuts and (lengths := tuple(b - a for a, b in pairwise(points[n] for n in cuts))) not in found:
                found.append(lengths)
        return found

    def _chunk_s(self, candidate: Candidate, start: int, end: int) -> float:
        """Seconds that a chunk occupies the slowest stage, or its blocks the slowest link."""
        sizes = [b - a for a, b in pairwise((*candidate.starts, self.layers))]
        machine = self.machine
        compute = max(
            count * cost.seconds(start, end - start)
            for count, cost in zip(sizes, machine.layers, strict=True)
        )
        if len(sizes) == 1:
            return compute
        links = machine.links.speeds
        nbytes = (end - start) * machine.block_bytes
        wire = max(sizes[one.source] * (one.latency_s + nbytes / one.together) for one in links)
        return max(compute, wire)

    def _shifted(self, candidate: Candidate) -> Candidate:
        """Boundaries between neighbours moved as long as that helps, by ever smaller steps."""
        best, tokens = candidate, sum(candidate.lengths)
        step = _grain(tokens)
        while True:
            moved = (
                replace(best, lengths=lengths)
                for n in range(len(best.lengths) - 1)
                for by in (-step, step)
                if min((lengths := _passed(best.lengths, n, by))[n : n + 2]) >= min(SMALLEST, tokens)
            )
            better = self._faster(best, moved)
            if better == best:
                step //= 2
                if step < SMALLEST // 2:
                    return best
            best = better

    # -- sentences

    def _best_told(self, best: Candidate, default: Candidate, wanted: Sequence[str]) -> Candidate:
        """The fastest of the candidate and what its sentences would compare it with, which the search need not have
        tried."""
        while True:
            others = [one for name in wanted for one in self._beside(name, best, default).values()]
            fastest = min(others, key=self.seconds, default=best)
            if self.seconds(fastest) >= self.seconds(best) * (1 - SLACK):
                return best
            best = fastest

    def _beside(self, name: str, best: Candidate, default: Candidate) -> dict[str, Candidate]:
        """What `best` is compared with in the sentence on this choice, by its name there."""
        match name:
            case "schedule":
                return {other: replace(best, schedule=other) for other in SAFE if other != best.schedule}
            case "sync_strategy":
                names: tuple[SyncStrategy, ...] = get_args(SyncStrategy)
                return {o: replace(best, sync_strategy=o) for o in names if o != best.sync_strategy}
            case "layer_split":
                return {"equal ones": replace(best, starts=even_starts(self.layers, len(best.starts)))}
            case _:
                told = f"{len(default.lengths)} of up to {max(default.lengths)} tokens"
                return {told: replace(best, lengths=default.lengths)}

    def _because(self, name: str, best: Candidate, default: Candidate) -> str:
        others = self._beside(name, best, default)
        if name in ("schedule", "sync_strategy"):
            return self._against(f"{name} {getattr(best, name)}", best, others)
        ((told, other),) = others.items()
        took, instead = f"{self.seconds(best):.4g} s", f"{told} {self.seconds(other):.4g} s"
        if name == "layer_split":
            stages = ", ".join(str(b - a) for a, b in pairwise((*best.starts, self.layers)))
            chosen = f"{numbers_text(best.starts[1:])}: stages of {stages} layers take {took}"
            return f"{name} {chosen}, {instead}{self._uneven()}."
        count = len(best.lengths)
        chunks = f"{count} chunks take" if count > 1 else "1 chunk takes"
        return f"{name} {numbers_text(best.lengths)}: {chunks} {took}, {instead}."

    def _against(self, what: str, best: Candidate, others: Mapping[str, Candidate]) -> str:
        if len(best.starts) == 1:
            return f"{what}: with one rank nothing is sent."
        took, told = self.seconds(best), list[str]()
        for name, other in others.items():
            seconds = self.seconds(other)
            if seconds <= took * (1 + SLACK):
                told.append(f"{name} takes as long")
            else:
                told.append(f"{name} cannot beat it here: {seconds:.4g} s instead of {took:.4g} s")
        return f"{what}: {'; '.join(told)}."

    def _uneven(self) -> str:
        """What makes the ranks unlike, in words."""
        times = [cost.seconds(0, 128) for cost in self.machine.layers]
        slowest = max(range(len(times)), key=times.__getitem__)
        if times[slowest] < 1.1 * min(times):
            return ""
        return f"; for a layer rank {slowest} takes {times[slowest] / min(times):.2g} times as long as the fastest rank"


BOUNDS = 12
"""how many bounds on a chunk's time are tried"""


def even_lengths(tokens: int, count: int) -> tuple[int, ...]:
    """`count` chunks that differ by one token at most, the longer ones first."""
    small, larger = divmod(tokens, count)
    return tuple(small + (n < larger) for n in range(count))


def sized_lengths(tokens: int, chunk_size: int) -> tuple[int, ...]:
    """Chunks of `chunk_size` tokens, the last one possibly fewer."""
    return tuple(min(chunk_size, tokens - at) for at in range(0, tokens, chunk_size))


def even_starts(layers: int, ranks: int) -> tuple[int, ...]:
    """The first layers of stages as equal as they can be."""
    return partition(layers=layers, tokens=1, world_size=ranks, chunk_size=1).starts


def quadratic_lengths(tokens: int, chunk_size: int, smoothing: float = 0.5) -> tuple[int, ...]:
    """A rule of serving engines, as a baseline: chunks that shrink so that each has about the attention of the first, a
    chunk of x tokens after L others costing 2Lx + x², and only a part `smoothing` of that shrinking is followed."""
    lengths, start = list[int](), 0
    while start < tokens:
        alike = ((start * start + chunk_size * chunk_size) ** 0.5 - start) if start else float(chunk_size)
        length = ceil(smoothing * alike + (1 - smoothing) * chunk_size)
        length = min(max(length, min(SMALLEST, tokens)), tokens - start)
        lengths.append(length)
        start += length
    if len(lengths) > 1 and lengths[-1] < SMALLEST:
        last = lengths.pop()
        lengths[-1] += last
    return tuple(lengths)


def _grain(tokens: int) -> int:
    return min(tokens, max(SMALLEST, ceil(tokens / GRAINS)))


def _counts(tokens: int) -> list[int]:
    """Numbers of even chunks that are tried: all up to 8, then a few in each doubling."""
    most = max(1, min(GRAINS, tokens // SMALLEST))
    return sorted({n for n in (*range(1, 9), *(round(8 * 2 ** (k / 4)) for k in range(13))) if n <= most})


def _spread(values: Sequence[float], count: int) -> list[float]:
    """`count` of these sorted values, from the first to the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(n * (len(values) - 1) / (count - 1))] for n in range(count)]


def _cheapest(times: dict[tuple[int, int], float], points: int, bound: float) -> list[int] | None:
    """The cuts, by number of point, with the least sum of times of which none is above `bound`; None if there are
    none. A chunk costs a little more than its time, so that of equal sums that with fewer chunks is taken."""
    least, following = [inf] * (points - 1) + [0.0], [0] * points
    for a in range(points - 2, -1, -1):
        for b in range(a + 1, points):
            took = times[a, b]
            if took <= bound and took * 1.000001 + least[b] < least[a]:
                least[a], following[a] = took * 1.000001 + least[b], b
    if least[0] == inf:
        return None
    cuts = [0]
    while cuts[-1] < points - 1:
        cuts.append(following[cuts[-1]])
    return cuts


def _moved(starts: tuple[int, ...], n: int, step: int) -> tuple[int, ...]:
    return (*starts[:n], starts[n] + step, *starts[n + 1 :])


def _fits(starts: Sequence[int], layers: int) -> bool:
    return all(a < b for a, b in pairwise((*starts, layers)))


def _passed(lengths: tuple[int, ...], n: int, tokens: int) -> tuple[int, ...]:
    """Tokens passed from a chunk to the next."""
    return (*lengths[:n], lengths[n] - tokens, lengths[n + 1] + tokens, *lengths[n + 2 :])

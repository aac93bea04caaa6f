"""Proof that a plan is complete and free of deadlock, or the shortest counterexample.

`verify` trusts nothing about how the plan was built. It proves that every channel belongs to one lane at each end;
every send meets exactly one recv of the same value and size; every value is made once on a rank, before it is needed;
at the end every rank holds each block and the final state exactly once; and there is no deadlock, with sends that wait
for their recv (rendezvous) or buffered ones. In a lowered plan (`lower`), also that each pair of ranks issues its
transfers on one communicator in the same order.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import chain, product
from typing import Literal

from dinfer.plan.graph import NONE, Graph, gc_paused, levels, simulate
from dinfer.plan.ops import FINAL, Op, Value
from dinfer.plan.plan import OpPlace, Plan

MAX_STEPS = 1_000_000

Flaw = Literal[
    "out of range", "shared channel", "unmatched", "mismatch", "size", "missing", "made twice", "pair order", "cycle"
]  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """A proved plan's counts. `levels`: the layer ops on the longest path through the plan."""

    ranks: int
    lanes: int
    ops: int
    transfers: int
    blocks: int
    levels: int
    proved: Literal[True] = field(default=True, init=False)

    def __str__(self) -> str:
        return (
            f"proved: {self.ranks} ranks, {self.lanes} lanes, {self.ops} ops; each of {self.transfers} sends meets one "
            f"recv; all ranks end with the same {self.blocks} blocks; no deadlock with rendezvous or buffered sends; "
            f"{self.levels} layers on the longest path"
        )


@dataclass(frozen=True)
class Counterexample:
    """Why a plan must not run: `steps` are sentences, `places` the ops in them, in the same order."""

    flaw: Flaw
    steps: tuple[str, ...]
    places: tuple[OpPlace, ...]
    sends: Literal["", "rendezvous", "buffered"] = ""
    proved: Literal[False] = field(default=False, init=False)

    def __str__(self) -> str:
        steps = "; ".join(self.steps)
        if self.flaw == "cycle":
            even = "even " if self.sends == "buffered" else ""
            return f"refuted: deadlock {even}with {self.sends} sends: {steps}"
        return f"refuted ({self.flaw}): {steps}"


@gc_paused()
def verify(plan: Plan) -> Proof | Counterexample:
    """Prove the plan, or find a counterexample. Raises PlanError for one that is out of all proportion: see Graph."""
    for place, op in plan.places():
        if wrong := _range_error(plan, place.rank, op):
            return Counterexample("out of range", (f"rank {place.rank}: `{op}`: {wrong}",), (place,))
    graph = Graph(plan)
    for check in (_shared_channels, _transfers, _values, _pair_orders):
        if bad := next(check(graph), None):
            return bad
    # Buffered first: a plan that hangs even then should not be blamed on sends that wait.
    if bad := _deadlock(graph, simulate(graph, rendezvous=False).done, "buffered"):
        return bad
    meeting = simulate(graph, rendezvous=True)
    if bad := _deadlock(graph, meeting.done, "rendezvous"):
        return bad
    return Proof(
        ranks=plan.world_size,
        lanes=len(graph.first),
        ops=len(graph.ops),
        transfers=sum(op.kind == "send" for op in graph.ops),
        blocks=plan.shape.blocks,
        levels=max(levels(graph, meeting.order)),
    )


def _range_error(plan: Plan, rank: int, op: Op) -> str:
    shape = plan.shape
    chunks = len(shape.chunks)
    if op.is_transfer and (op.peer == rank or not 0 <= op.peer < plan.world_size):
        return f"rank {op.peer} is no peer of rank {rank}; the plan has {plan.world_size} ranks"
    if op.what == "final":
        return ""
    if not 0 <= op.chunk < chunks:
        return f"chunk {op.chunk} is out of range; the plan has {chunks} chunks"
    if op.kind == "norm":
        right = op.chunk == chunks - 1 and op.layer == shape.layers
        return "" if right else f"the final state is the norm of c{chunks - 1} l{shape.layers}"
    last = shape.layers if op.is_transfer and op.what == "hidden" else shape.layers - 1
    if op.kind != "embed" and not 0 <= op.layer <= last:
        return f"layer {op.layer} is out of range; the plan has {shape.layers} layers"
    return ""


def _shared_channels(graph: Graph) -> Iterator[Counterexample]:
    for channel, ends in graph.channels.items():
        for verb, numbers in zip(("sends", "receives"), ends, strict=True):
            other = next((n for n in numbers if graph.lane_of[n] != graph.lane_of[numbers[0]]), None)
            if other is not None:
                rank = graph.ranks[other]
                places = graph.place(numbers[0]), graph.place(other)
                lanes = (f"{graph.plan.lanes[rank][p.lane].name} (`{graph.plan.op(p)}`)" for p in places)
                text = (
                    f"rank {rank} {verb} on the {channel.communicator} channel {channel.source}→{channel.target} "
                    f"from two lanes, {' and '.join(lanes)}, so their order is not fixed"
                )
                yield Counterexample("shared channel", (text,), places)


def _transfers(graph: Graph) -> Iterator[Counterexample]:
    for number, op in enumerate(graph.ops):
        if not op.is_transfer:
            continue
        partner = graph.partner[number]
        if partner == NONE:
            wanted = "recv" if op.kind == "send" else "send"
            text = f"{graph.name(number)} has no {wanted} on rank {op.peer} to meet"
            yield Counterexample("unmatched", (text,), (graph.place(number),))
        elif (other := graph.ops[partner])[1:4] != op[1:4]:  # chunk, layer, what: a slice, for speed
            text = f"{graph.name(number)} meets {graph.name(partner)}, which carries {other.value}"
            yield Counterexample("mismatch", (text,), (graph.place(number), graph.place(partner)))
        elif op.tokens != (expected := graph.plan.expected_tokens(op)):
            plural = "" if expected == 1 else "s"
            text = f"{graph.name(number)} has the wrong size: {op.value} has {expected} token{plural}"
            yield Counterexample("size", (text,), (graph.place(number),))


def _values(graph: Graph) -> Iterator[Counterexample]:
    for rank, makers_of in enumerate(graph.makers):
        for value, makers in makers_of.items():
            if len(makers) > 1:
                first, second = (graph.ops[n] for n in makers[:2])
                text = f"rank {rank} makes {value} twice, by `{first}` and by `{second}`"
                yield Counterexample("made twice", (text,), tuple(graph.place(n) for n in makers[:2]))
    for number, deps in enumerate(graph.deps):
        if NONE in deps:
            need = graph.needs(number)[deps.index(NONE)]
            text = f"{graph.name(number)} needs {need}, which no op on rank {graph.ranks[number]} makes"
            yield Counterexample("missing", (text,), (graph.place(number),))
    shape = graph.plan.shape
    for rank in range(shape.world_size):  # a plan may have lanes for fewer ranks
        blocks = (Value("kv", *block) for block in product(range(len(shape.chunks)), range(shape.layers)))
        for value in chain(blocks, [FINAL]):  # one after another: most plans with a mistake lack an early one
            if rank >= len(graph.makers) or value not in graph.makers[rank]:
                text = f"rank {rank} ends without {value}: no op there makes or receives it"
                yield Counterexample("missing", (text,), ())


def _pair_orders(graph: Graph) -> Iterator[Counterexample]:
    """In a lowered plan, two ranks that issue their transfers on one communicator in different orders.

    NCCL runs a pair's transfers one after another, both directions together; threads may run them in any order.
    """
    if not graph.plan.is_lowered:
        return
    expected: dict[tuple[int, int, str], deque[int]] = {}
    for number, op in enumerate(graph.ops):
        if not op.is_transfer:
            continue
        low, high = sorted((graph.ranks[number], op.peer))
        queue = expected.setdefault((low, high, op.communicator), deque())
        if graph.ranks[number] == low:
            queue.append(graph.partner[number])
        elif (first := queue.popleft()) != number:
            # This rank issues `number` before `first`; the other one issues their counterparts in the opposite order.
            pairs = (graph.partner[first], graph.partner[number]), (number, first)
            steps = tuple(
                f"rank {graph.ranks[a]} issues `{graph.ops[a]}` before `{graph.ops[b]}`" for a, b in pairs
            )
            meaning = (
                f"on the {op.communicator} communicator NCCL runs each rank's transfers with a peer in the order in "
                "which it issues them, so the two ranks deadlock"
            )
            places = tuple(graph.place(n) for pair in pairs for n in pair)
            yield Counterexample("pair order", (*steps, meaning), places)


def _deadlock(
    graph: Graph, done: bytearray, sends: Literal["rendezvous", "buffered"]
) -> Counterexample | None:
    if all(done):
        return None
    heads = {  # by lane, its next op, if it is not finished
        graph.lane_of[number]: number
        for number, before in enumerate(graph.before)
        if not done[number] and (before == NONE or done[before])
    }
    waits: dict[int, list[int]] = {}
    for head in heads.values():
        targets = [dep for dep in graph.deps[head] if not done[dep]] or [graph.partner[head]]
        waits[head] = list(dict.fromkeys(heads[graph.lane_of[target]] for target in targets))
    cycle = shortest_cycle(waits)
    return Counterexample(
        "cycle",
        tuple(_step(graph, *pair, done) for pair in zip(cycle, cycle[1:] + cycle[:1], strict=True)),
        tuple(graph.place(head) for head in cycle),
        sends,
    )


def shortest_cycle(edges: dict[int, list[int]]) -> list[int]:
    """A shortest cycle of a directed graph, from its smallest node; empty without one. By breadth-first search from
    each node; past MAX_STEPS of it (thousands of lanes), the shortest so far, or any."""
    best: list[int] = []
    steps = 0
    for start in sorted(edges):
        if steps > MAX_STEPS:
            return best or any_cycle(edges)
        parents: dict[int, int] = {}
        queue = deque([start])
        while queue and start not in parents:
            node = queue.popleft()
            steps += 1
            for following in edges.get(node, ()):
                if following not in parents:
                    parents[following] = node
                    queue.append(following)
        if start in parents:
            path = [parents[start]]
            while path[-1] != start:
                path.append(parents[path[-1]])
            if not best or len(path) < len(best):
                best = path[::-1]
    return best


def any_cycle(edges: dict[int, list[int]]) -> list[int]:
    """Some cycle of a directed graph, from its smallest node; empty without one."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        cycle: list[int] = error.args[1][:0:-1]  # it lists predecessors, and the first node at both ends
        at = cycle.index(min(cycle))
        return cycle[at:] + cycle[:at]
    return []


def _step(graph: Graph, head: int, following: int, done: bytearray) -> str:
    """What `head` waits for, as text; `following` is the next op of the lane that blocks it."""
    op, rank = graph.ops[head], graph.ranks[head]
    needs = zip(graph.deps[head], graph.needs(head), strict=True)
    unmet = {dep: need for dep, need in needs if not done[dep]}
    if unmet:
        maker = next(n for n in unmet if graph.lane_of[n] == graph.lane_of[following])
        return (
            f"rank {rank} cannot start `{op}` before {unmet[maker]}, which `{graph.ops[maker]}` makes later"
        )
    if op.kind == "send":
        return f"rank {rank} sends {op.value} to rank {op.peer} and waits"
    return f"rank {rank} waits to receive {op.value} from rank {op.peer}"

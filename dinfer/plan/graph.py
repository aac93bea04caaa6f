"""Graph: the edges of a plan's data flow, for `verify`, `cut` and `lower`.

Ops are numbered lane by lane. The k-th send from one rank to another on one communicator meets the k-th recv there. A
plan with errors is not refused here: a missing edge is NONE.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from dinfer.plan.ops import Op, PlanError, Value
from dinfer.plan.plan import OpPlace, Plan

NONE = -1

MAX_DEPS = 10_000_000
"""a plan has a few for each op; only one whose chunks are out of order has more"""


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection while a large graph without cycles is built: it would take a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Channel(NamedTuple):
    """One direction between two ranks on one communicator; messages arrive in the order of their sends."""

    communicator: str
    source: int
    target: int


def channel_of(rank: int, op: Op) -> Channel:
    """The channel that a transfer of `rank` uses."""
    source, target = (rank, op.peer) if op.kind == "send" else (op.peer, rank)
    return Channel(op.communicator, source, target)


class Graph:
    """The ops of a plan by number, and the edges between them.

    For op n: `deps[n]` are the ops that make the values it needs (NONE if none does), without those that an earlier op
    of its lane has waited for; `partner[n]` the counterpart of a transfer, `before[n]` the previous op on its lane,
    `lane_of[n]` its lane. `first[lane]` is the number of a lane's first op. `makers[rank]`: by value, the ops that make
    it on that rank. `channels`: by channel, its sends and recvs. Raises PlanError for more than MAX_DEPS.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ops: list[Op] = []
        self.ranks: list[int] = []
        self.lane_of: list[int] = []
        self.first: list[int] = []
        self.before: list[int] = []
        self.makers: list[dict[Value, list[int]]] = [{} for _ in plan.lanes]
        self.channels: dict[Channel, tuple[list[int], list[int]]] = {}
        for rank, lanes in enumerate(plan.lanes):
            for lane in lanes:
                start = len(self.ops)
                self.lane_of += [len(self.first)] * len(lane.ops)
                self.first.append(start)
                self.ops += lane.ops
                self.ranks += [rank] * len(lane.ops)
                self.before += [NONE, *range(start, start + len(lane.ops) - 1)][: len(lane.ops)]
                for number, op in enumerate(lane.ops, start):
                    for value in op.makes():
                        self.makers[rank].setdefault(value, []).append(number)
                    if op.is_transfer:
                        ends = self.channels.setdefault(channel_of(rank, op), ([], []))
                        ends[op.kind == "recv"].append(number)
        self.partner = [NONE] * len(self.ops)
        for sends, recvs in self.channels.values():
            for a, b in zip(sends, recvs, strict=False):
                self.partner[a], self.partner[b] = b, a
        self.deps: list[list[int]] = []
        self._awaited = [0] * len(self.ops)  # for a layer: the blocks of so many chunks were awaited before
        self._add_deps()

    def _add_deps(self) -> None:
        chunks, count = len(self.plan.shape.chunks), 0
        blocks: dict[tuple[int, int], list[int]] = {}
        awaited: dict[tuple[int, int], int] = {}  # by lane and layer
        for number, (rank, op) in enumerate(zip(self.ranks, self.ops, strict=True)):
            if op.kind == "layer":
                # All chunks' blocks of this layer, looked up once a layer, not once a pair of chunks.
                if (rank, op.layer) not in blocks:
                    values = (Value("kv", chunk, op.layer) for chunk in range(chunks))
                    blocks[rank, op.layer] = [self.maker(rank, value) for value in values]
                before = awaited.get((self.lane_of[number], op.layer), 0)
                self._awaited[number] = before
                awaited[self.lane_of[number], op.layer] = max(before, op.chunk)
                hidden = self.maker(rank, Value("hidden", op.chunk, op.layer))
                self.deps.append([hidden, *blocks[rank, op.layer][before : op.chunk]])
            else:
                self.deps.append([self.maker(rank, need) for need in op.needs()])
            count += len(self.deps[-1])
            if count > MAX_DEPS:
                raise PlanError(
                    f"up to {self.name(number)}, ops wait for more than {MAX_DEPS:,} others: the chunks of a layer "
                    "must be on one lane, and in order."
                )

    def needs(self, number: int) -> list[Value]:
        """The values that `deps[number]` make, in the same order."""
        needs = self.ops[number].needs()
        return needs[:1] + needs[1 + self._awaited[number] :]

    def maker(self, rank: int, value: Value) -> int:
        """The first op that makes `value` on `rank`, or NONE."""
        makers = self.makers[rank].get(value)
        return makers[0] if makers else NONE

    @cached_property
    def dependents(self) -> list[list[int]]:
        """For each op, the ops that wait for it: those that need its values, and the next on its lane."""
        found: list[list[int]] = [[] for _ in self.ops]
        for number, deps in enumerate(self.deps):
            for dep in deps:
                if dep != NONE:
                    found[dep].append(number)
            if self.before[number] != NONE:
                found[self.before[number]].append(number)
        return found

    def place(self, number: int) -> OpPlace:
        """Where op `number` stands in the plan."""
        rank, lane = self.ranks[number], self.lane_of[number]
        return OpPlace(rank, lane - self.first_lane[rank], number - self.first[lane])

    @cached_property
    def first_lane(self) -> list[int]:
        """By rank, the number of lanes on the ranks before it."""
        return [0, *accumulate(len(lanes) for lanes in self.plan.lanes)]

    def name(self, number: int) -> str:
        """For example `rank 1: `layer c0 l3``."""
        return f"rank {self.ranks[number]}: `{self.ops[number]}`"


class Simulation(NamedTuple):
    """How far a plan runs: `order` has the numbers of the ops that ended, `done[n]` is 1 if op n did."""

    order: list[int]
    done: bytearray


def simulate(graph: Graph, *, rendezvous: bool) -> Simulation:
    """Run the plan as a token game. The outcome does not depend on which lane runs first: lanes are deterministic.

    With `rendezvous`, a send ends together with its recv; otherwise sends are buffered and end at once. A recv without
    a counterpart never ends, and with rendezvous neither does such a send.
    """
    dependents, partner, ops = graph.dependents, graph.partner, graph.ops
    missing = [len(deps) + (before != NONE) for deps, before in zip(graph.deps, graph.before, strict=True)]
    done = bytearray(len(ops))
    order: list[int] = []
    ready = [number for number in range(len(ops) - 1, -1, -1) if not missing[number]]
    while ready:
        number = ready.pop()
        if done[number]:
            continue
        op, peer = ops[number], partner[number]
        if op.kind == "send":
            met = peer != NONE and not missing[peer]
            ending = (number, peer) if met else () if rendezvous else (number,)
        elif op.kind == "recv":
            sent = peer != NONE and (done[peer] or (rendezvous and not missing[peer]))
            ending = () if not sent else (number,) if done[peer] else (peer, number)
        else:
            ending = (number,)
        for ended in ending:
            done[ended] = 1
            order.append(ended)
            for dependent in dependents[ended]:
                missing[dependent] -= 1
                if not missing[dependent]:
                    ready.append(dependent)
    return Simulation(order, done)


def levels(graph: Graph, order: list[int]) -> list[int]:
    """By op, the number of layer ops on the longest path that ends with it.

    `order`: that of a simulation with rendezvous in which every op ended.
    """
    level = [0] * len(graph.ops)
    latest = [0] * len(graph.ops)
    for number in order:
        partner = graph.partner[number]
        reached = latest[number] if partner == NONE else max(latest[number], latest[partner])
        level[number] = reached = reached + (graph.ops[number].kind == "layer")
        for dependent in graph.dependents[number]:
            if latest[dependent] < reached:
                latest[dependent] = reached
    return level

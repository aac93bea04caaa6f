"""Consistent cuts of a verified plan: what one step means, where a stop ends, what going back undoes.

A cut is one position on every lane of every rank (how many of its ops are in). It is consistent if it holds
whatever its ops need and, for every send, the recv, and the other way round: a run brought to a consistent
cut has no lane blocked.

Each unit of stepping is a chain of consistent cuts from start to end: after each block in the global order
(`layer`), after each rank's next layer (`wave`), after each chunk (`chunk`). A step on joins the first link
that is not yet in; a step back goes to the last link that lies inside. Everything here is a pure function of
plan and cut.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Set
from functools import cached_property
from itertools import groupby
from numbers import Integral
from typing import Literal

from dinfer.plan.graph import NONE, Graph, levels, simulate
from dinfer.plan.ops import Op, PlanError
from dinfer.plan.plan import OpPlace, Plan

Cut = tuple[tuple[int, ...], ...]
"""positions[rank][lane]: the number of ops of that lane that are in"""

Unit = Literal["op", "layer", "wave", "chunk"]

UNITS: tuple[Unit, ...] = ("op", "layer", "wave", "chunk")

Block = tuple[int, int]
"""(chunk, layer)"""


def meet(one: Cut, other: Cut) -> Cut:
    """The largest cut inside both; consistent if both are."""
    return tuple(tuple(map(min, mine, theirs)) for mine, theirs in zip(one, other, strict=True))


def join(one: Cut, other: Cut) -> Cut:
    """The smallest cut that holds both; consistent if both are."""
    return tuple(tuple(map(max, mine, theirs)) for mine, theirs in zip(one, other, strict=True))


def is_inside(one: Cut, other: Cut) -> bool:
    return meet(one, other) == one


class Cuts:
    """The consistent cuts of one plan, which must have been proved. Raises PlanError if it can hang."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._graph = Graph(plan)
        order = simulate(self._graph, rendezvous=True).order
        if len(order) < len(self._graph.ops):
            raise PlanError("cuts exist only for a plan that verify has proved; this one can hang.")
        self._topological = {number: at for at, number in enumerate(order)}
        self._levels = levels(self._graph, order)
        self._chains: dict[Unit, list[Cut]] = {}
        self.start: Cut = tuple(tuple(0 for _ in lanes) for lanes in plan.lanes)
        self.end: Cut = tuple(tuple(len(lane.ops) for lane in lanes) for lanes in plan.lanes)

    # -- what users ask for

    @cached_property
    def blocks(self) -> list[Block]:
        """All blocks in the global order: as they are computed if every layer takes equally long."""
        return [block for _, block in self._leveled_blocks]

    def is_consistent(self, cut: Cut) -> bool:
        """Whether no op inside needs, or meets, one outside. False for positions that no lane has."""
        if not (is_inside(self.start, cut) and is_inside(cut, self.end)):
            return False
        numbers = self._numbers(cut)
        return self._close(numbers) == numbers

    def after_block(self, chunk: int, layer: int) -> Cut:
        """The cut just after that block is on every rank, with all blocks before it in the global order."""
        if (chunk, layer) not in self._block_ops:
            shape = self.plan.shape
            raise PlanError(
                f"there is no block c{chunk} l{layer}: chunks go from 0 to {len(shape.chunks) - 1}, "
                f"layers from 0 to {shape.layers - 1}."
            )
        return self.chain("layer")[self.blocks.index((chunk, layer)) + 1]

    def unmet(self, cut: Cut) -> Iterator[int]:
        """The numbers of the ops that are not in, in the order in which single steps take them."""
        inside = self._numbers(cut)
        return (number for number in self._op_order if number not in inside)

    def rank_and_op(self, number: int) -> tuple[int, Op]:
        """The op of that number, and its rank."""
        return self._graph.ranks[number], self._graph.ops[number]

    def after_op(self, number: int) -> Cut:
        """The smallest consistent cut that holds that op."""
        return self._positions(self._close((number,)))

    def next(self, cut: Cut, unit: Unit) -> Cut:
        """One step on from `cut`; the same cut at the end."""
        if unit == "op":
            inside = self._numbers(cut)
            following = next((n for n in self._op_order if n not in inside), NONE)
            return self._positions(self._close((following,), inside))
        chain = self.chain(unit)
        at = bisect_left(chain, True, key=lambda link: not is_inside(link, cut))
        return join(cut, chain[at]) if at < len(chain) else cut

    def previous(self, cut: Cut, unit: Unit) -> Cut:
        """One step back from `cut`; the same cut at the start."""
        if unit == "op":
            inside = self._numbers(cut)
            last = next((n for n in reversed(self._op_order) if n in inside), NONE)
            return self._positions(self._without(last, inside))
        chain = self.chain(unit)
        at = bisect_left(chain, True, key=lambda link: not is_inside(link, cut) or link == cut)
        return chain[at - 1] if at else cut

    def stop(self, positions: Cut, started: Set[OpPlace]) -> tuple[Cut, list[OpPlace]]:
        """Where lanes frozen at `positions` come to stand, and the recvs to be released by a void header.

        `started` are the ops at those positions that have begun. A send or a compute op that has begun must
        end, with all it needs; a recv that has begun stays in only if its send is in as well.
        """
        begun = {self._number(place) for place in started}
        bound = {n for n in begun if self._graph.ops[n].kind != "recv"}
        closed = self._close(bound | self._numbers(positions))
        return self._positions(closed), [self._graph.place(n) for n in sorted(begun - closed)]

    def chain(self, unit: Unit) -> list[Cut]:
        """The cuts that steps of `unit` go through, from start to end. Raises PlanError for an unknown unit.

        Single ops have no chain: with one cut per op it would be long, and steps by op can do without.
        """
        if unit not in self._chains:
            self._chains[unit] = self._links(self._groups(unit))
        return self._chains[unit]

    # -- blocks and the order of ops

    def _groups(self, unit: Unit) -> list[list[Block]]:
        """The blocks that each step of `unit` brings."""
        if unit == "layer":
            return [[block] for block in self.blocks]
        if unit == "wave":
            same_level = groupby(self._leveled_blocks, key=lambda b: b[0])
            return [[block for _, block in same] for _, same in same_level]
        if unit == "chunk":
            return [list(same) for _, same in groupby(sorted(self.blocks), key=lambda b: b[0])]
        raise PlanError(f"{unit!r} is not a unit to step by; use one of {', '.join(UNITS)}.")

    def _links(self, groups: list[list[Block]]) -> list[Cut]:
        links = [self.start]
        counts = [0] * len(self._graph.first)
        inside: set[int] = set()
        for group in groups:
            for number in self._add((n for block in group for n in self._block_ops[block]), inside):
                counts[self._graph.lane_of[number]] += 1
            links.append(self._shaped(counts))
        links[-1] = self.end  # with the last block comes all that is left: the final state
        return links

    @cached_property
    def _leveled_blocks(self) -> list[tuple[int, Block]]:
        """All blocks with the level at which they are first computed, in the global order."""
        earliest: dict[Block, int] = {}
        for level, op in zip(self._levels, self._graph.ops, strict=True):
            if op.kind == "layer":
                block = op.chunk, op.layer
                earliest[block] = min(level, earliest.get(block, level))
        return sorted((level, block) for block, level in earliest.items())

    @cached_property
    def _block_ops(self) -> dict[Block, list[int]]:
        """The ops that make each block on some rank: its layer and the recvs of its sync."""
        found: dict[Block, list[int]] = {}
        for number, op in enumerate(self._graph.ops):
            if op.kind == "layer" or (op.kind == "recv" and op.what == "kv"):
                found.setdefault((op.chunk, op.layer), []).append(number)
        return found

    @cached_property
    def _op_order(self) -> list[int]:
        """Every op, in the order in which single steps take them: by level, so that ranks take turns."""
        return sorted(range(len(self._graph.ops)), key=lambda n: (self._levels[n], self._topological[n]))

    # -- cuts as sets of op numbers

    def _numbers(self, cut: Cut) -> set[int]:
        positions = (position for lanes in cut for position in lanes)
        return {
            first + i
            for first, position in zip(self._graph.first, positions, strict=True)
            for i in range(position)
        }

    def _positions(self, numbers: Set[int]) -> Cut:
        counts = [0] * len(self._graph.first)
        for number in numbers:
            counts[self._graph.lane_of[number]] += 1
        return self._shaped(counts)

    def _shaped(self, counts: list[int]) -> Cut:
        lanes = iter(counts)
        return tuple(tuple(next(lanes) for _ in rank) for rank in self.plan.lanes)

    def _number(self, place: OpPlace) -> int:
        graph = self._graph
        return graph.first[graph.first_lane[place.rank] + place.lane] + place.index

    def _close(self, numbers: Iterable[int], inside: Set[int] = frozenset()) -> set[int]:
        """`inside` (already closed) and the fewest ops that make `numbers` consistent with it."""
        closed = set(inside)
        self._add(numbers, closed)
        return closed

    def _add(self, numbers: Iterable[int], closed: set[int]) -> list[int]:
        """Close `closed` over `numbers`, in place; what that added."""
        graph = self._graph
        added = []
        todo = [*numbers]
        while todo:
            number = todo.pop()
            if number == NONE or number in closed:
                continue
            closed.add(number)
            added.append(number)
            todo += graph.deps[number]
            todo += (graph.before[number], graph.partner[number])
        return added

    def _without(self, removed: int, inside: Set[int]) -> set[int]:
        """`inside` without op `removed` and without all that followed from it."""
        graph = self._graph
        left = set(inside)
        todo = [removed]
        while todo:
            number = todo.pop()
            if number in left:
                left.remove(number)
                todo += graph.dependents[number]
                todo.append(graph.partner[number])
        return left


_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")


def unit_of(name: str) -> Unit:
    """The unit of that name. Raises PlanError."""
    for unit in UNITS:
        if unit == name:
            return unit
    hint = " A number of steps is n, 1 or more." if _NUMBER.fullmatch(str(name)) else ""
    raise PlanError(f"{name!r} is not a unit to step by; use one of {', '.join(UNITS)}, token.{hint}")


def count_of(n: int, name: str = "n") -> int:
    """A number of steps or tokens. Raises PlanError."""
    if not isinstance(n, Integral) or isinstance(n, bool) or n < 1:
        raise PlanError(f"{name} is {n!r}; it must be a whole number, at least 1.")
    return n

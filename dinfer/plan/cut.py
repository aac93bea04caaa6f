"""Consistent cuts of a verified plan: where a step, a stop or a step back ends.

A cut is one position on every lane of every rank. It is consistent if it contains what its ops need and, for every
send, the recv, and for every recv, the send. A run at a consistent cut has no blocked lane.

The cuts of a unit of stepping form a chain from start to end: after each block in the global order (`layer`), after
each rank's next layer (`wave`), after each chunk (`chunk`). A step joins the first cut of the chain that is not yet in.
A step back takes out what the last unit that has begun has added since the cut of the chain before it, and nothing
else: what stays needs none of it, because the chain's cuts are consistent.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from functools import cached_property
from itertools import groupby
from numbers import Integral
from typing import Literal

from dinfer.errors import excerpt
from dinfer.plan.graph import NONE, Graph, levels, simulate
from dinfer.plan.ops import Op, PlanError
from dinfer.plan.partition import Block, within
from dinfer.plan.plan import OpPlace, Plan

Cut = tuple[tuple[int, ...], ...]
"""positions[rank][lane]: how many of the lane's ops are in the cut"""

Unit = Literal["op", "layer", "wave", "chunk"]
UNITS: tuple[Unit, ...] = ("op", "layer", "wave", "chunk")


def meet(one: Cut, other: Cut) -> Cut:
    """The largest cut inside both; consistent if both are."""
    return tuple(tuple(map(min, mine, theirs)) for mine, theirs in zip(one, other, strict=True))


def join(one: Cut, other: Cut) -> Cut:
    """The smallest cut that contains both; consistent if both are."""
    return tuple(tuple(map(max, mine, theirs)) for mine, theirs in zip(one, other, strict=True))


def is_inside(one: Cut, other: Cut) -> bool:
    """Whether `other` contains `one`."""
    return meet(one, other) == one


class Cuts:
    """The consistent cuts of one plan. Raises PlanError for a plan that can hang.

    `start` is the cut without any op, `end` the one with all ops.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._graph = Graph(plan)
        order = simulate(self._graph, rendezvous=True).order
        if len(order) < len(self._graph.ops):
            raise PlanError("this plan can hang, so it has no cuts to step by: verify says why.")
        self._topological = {number: at for at, number in enumerate(order)}
        self._levels = levels(self._graph, order)
        self._chains: dict[Unit, list[Cut]] = {}
        self.start: Cut = tuple(tuple(0 for _ in lanes) for lanes in plan.lanes)
        self.end: Cut = tuple(tuple(len(lane.ops) for lane in lanes) for lanes in plan.lanes)

    @cached_property
    def blocks(self) -> list[Block]:
        """All blocks in the global order: that in which they are computed if all layers take equally long."""
        return [block for _, block in self._leveled_blocks]

    def is_consistent(self, cut: Cut) -> bool:
        """Whether no op in the cut needs or meets an op outside. False for positions out of range."""
        if not (is_inside(self.start, cut) and is_inside(cut, self.end)):
            return False
        numbers = self._numbers(cut)
        return len(self._add(numbers, set())) == len(numbers)

    def after_block(self, chunk: int, layer: int) -> Cut:
        """The cut at which every rank has that block and all before it in the global order. Raises PlanError."""
        shape = self.plan.shape
        for name, given, count in (("chunk", chunk, len(shape.chunks)), ("layer", layer, shape.layers)):
            if not isinstance(given, Integral):
                within(name, given, count)  # it says what the number must be
        if (chunk, layer) not in self._block_ops:
            raise PlanError(
                f"there is no block c{chunk} l{layer}: chunks go from 0 to {len(shape.chunks) - 1}, "
                f"layers from 0 to {shape.layers - 1}."
            )
        return self.chain("layer")[self.blocks.index((chunk, layer)) + 1]

    def after_next(self, cut: Cut, matches: Callable[[int, Op], bool]) -> tuple[Cut, int, Op] | None:
        """The first op outside the cut, as steps by op run them, for which `matches(rank, op)` holds: the smallest
        consistent cut that contains it and `cut`, its rank and the op. None without one."""
        inside, graph = self._numbers(cut), self._graph
        for number in self._op_order:
            rank, op = graph.ranks[number], graph.ops[number]
            if number not in inside and matches(rank, op):
                self._add((number,), inside)
                return self._positions(inside), rank, op
        return None

    def ops_where(self, matches: Callable[[int, Op], bool]) -> list[tuple[int, Op]]:
        """All ops for which `matches(rank, op)` holds, each with its rank, as steps by op run them."""
        graph = self._graph
        found = ((graph.ranks[number], graph.ops[number]) for number in self._op_order)
        return [one for one in found if matches(*one)]

    def ops_back(self, cut: Cut) -> Iterator[tuple[int, Op]]:
        """The ops of a cut, each with its rank, as steps back by op undo them."""
        inside, graph = self._numbers(cut), self._graph
        return ((graph.ranks[n], graph.ops[n]) for n in reversed(self._op_order) if n in inside)

    def next(self, cut: Cut, unit: Unit) -> Cut:
        """The cut one step after `cut`; the same cut at the end."""
        if unit == "op":
            found = self.after_next(cut, lambda *_: True)
            return found[0] if found else cut
        chain = self.chain(unit)
        at = bisect_left(chain, True, key=lambda link: not is_inside(link, cut))
        return join(cut, chain[at]) if at < len(chain) else cut

    def previous(self, cut: Cut, unit: Unit) -> Cut:
        """`cut` without the last unit in the global order of which it has an op; the same cut at the start."""
        if unit == "op":
            graph, left = self._graph, self._numbers(cut)
            # Take out the last op, and all that depend on it.
            todo = [next((n for n in reversed(self._op_order) if n in left), NONE)]
            while todo:
                number = todo.pop()
                if number in left:
                    left.remove(number)
                    todo += (*graph.dependents[number], graph.partner[number])
            return self._positions(left)
        chain = self.chain(unit)
        at = bisect_left(chain, True, key=lambda link: is_inside(cut, link))
        return meet(cut, chain[at - 1]) if at else cut

    def stop(self, positions: Cut, started: Set[OpPlace]) -> tuple[Cut, list[OpPlace]]:
        """The cut at which lanes frozen at `positions` stop, and the recvs that a void header must release.

        `started`: the ops at those positions that have begun. A send or compute op that has begun must end, with all it
        needs. A recv that has begun is in the cut only if its send is.
        """
        graph = self._graph
        begun = {graph.first[graph.first_lane[place.rank] + place.lane] + place.index for place in started}
        bound = {n for n in begun if graph.ops[n].kind != "recv"}
        closed = set[int]()
        self._add(bound | self._numbers(positions), closed)
        return self._positions(closed), [graph.place(n) for n in sorted(begun - closed)]

    def chain(self, unit: Unit) -> list[Cut]:
        """The cuts that steps of `unit` pass, from start to end. Raises PlanError for an unknown unit.

        Steps by op have no chain: it would hold one cut an op, and they do not need it.
        """
        if unit in self._chains:
            return self._chains[unit]
        if unit == "layer":
            groups = [[block] for block in self.blocks]
        elif unit == "wave":
            waves = groupby(self._leveled_blocks, key=lambda leveled: leveled[0])
            groups = [[block for _, block in same_level] for _, same_level in waves]
        elif unit == "chunk":
            groups = [list(same) for _, same in groupby(sorted(self.blocks), key=lambda block: block[0])]
        else:
            raise PlanError(f"{unit!r} is not a unit to step by; use one of {', '.join(UNITS)}.")
        links, counts, inside = [self.start], [0] * len(self._graph.first), set[int]()
        for group in groups:
            for number in self._add((n for block in group for n in self._block_ops[block]), inside):
                counts[self._graph.lane_of[number]] += 1
            links.append(self._by_rank(counts))
        links[-1] = self.end  # the last step also adds what is left: the final state
        self._chains[unit] = links
        return links

    @cached_property
    def _leveled_blocks(self) -> list[tuple[int, Block]]:
        """All blocks in the global order, each with the level at which it is first computed."""
        earliest: dict[Block, int] = {}
        for level, op in zip(self._levels, self._graph.ops, strict=True):
            if op.kind == "layer":
                block = op.chunk, op.layer
                earliest[block] = min(level, earliest.get(block, level))
        return sorted((level, block) for block, level in earliest.items())

    @cached_property
    def _block_ops(self) -> dict[Block, list[int]]:
        """By block, the ops that make it on some rank: its layer op and the recvs of its sync."""
        found: dict[Block, list[int]] = {}
        for number, op in enumerate(self._graph.ops):
            if op.kind == "layer" or (op.kind == "recv" and op.what == "kv"):
                found.setdefault((op.chunk, op.layer), []).append(number)
        return found

    @cached_property
    def _op_order(self) -> list[int]:
        """Every op in the order in which steps by op run them: by level, so that ranks take turns."""
        return sorted(range(len(self._graph.ops)), key=lambda n: (self._levels[n], self._topological[n]))

    # -- cuts as sets of op numbers

    def _numbers(self, cut: Cut) -> set[int]:
        positions = (position for lanes in cut for position in lanes)
        lanes = zip(self._graph.first, positions, strict=True)
        return {first + index for first, position in lanes for index in range(position)}

    def _positions(self, numbers: Set[int]) -> Cut:
        counts = [0] * len(self._graph.first)
        for number in numbers:
            counts[self._graph.lane_of[number]] += 1
        return self._by_rank(counts)

    def _by_rank(self, counts: list[int]) -> Cut:
        lanes = iter(counts)
        return tuple(tuple(next(lanes) for _ in rank) for rank in self.plan.lanes)

    def _add(self, numbers: Iterable[int], closed: set[int]) -> list[int]:
        """Add `numbers` and all that they need to `closed`, in place. Returns what was added."""
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


def unit_of(name: str) -> Unit:
    """The unit of that name. Raises PlanError for an unknown name."""
    for unit in UNITS:
        if unit == name:
            return unit
    is_number = re.fullmatch(r"[-+]?\d+(\.\d*)?", str(name))
    hint = " The number of steps is n, at least 1." if is_number else ""
    raise PlanError(f"{name!r} is not a unit to step by; use one of {', '.join(UNITS)}, token.{hint}")


def count_of(n: int, name: str = "n") -> int:
    """Check a number of steps or tokens. Raises PlanError unless it is a whole number of at least 1."""
    if not isinstance(n, Integral) or isinstance(n, bool) or n < 1:
        raise PlanError(f"{name} is {n!r}; it must be a whole number, at least 1.")
    return n


def cut_of(cuts: Cuts, positions: Sequence[Sequence[int]]) -> Cut:
    """The cut with these positions, by rank and lane. Raises PlanError for what is no consistent cut of the plan."""
    lanes = [len(one) for one in cuts.end]
    try:
        cut = tuple(tuple(map(int, one)) for one in positions)
    except (TypeError, ValueError):
        cut = ()
    if [len(one) for one in cut] != lanes:
        raise PlanError(
            f"positions are {excerpt(positions)}; they must be a list for each of {len(lanes)} ranks, of a number for "
            f"each of its {' or '.join(map(str, sorted(set(lanes))))} lanes."
        )
    if not cuts.is_consistent(cut):
        raise PlanError(
            f"positions are {excerpt(positions)}; there an op would lack what it needs, or a send its recv: take those "
            "at which a run stood."
        )
    return cut

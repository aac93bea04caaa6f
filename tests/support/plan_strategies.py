"""Shapes, plans and plans with mistakes, for hypothesis. Not a test; engine tests use it as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from hypothesis import strategies as st

from dinfer.config import Schedule
from dinfer.plan.graph import NONE, Graph
from dinfer.plan.lower import lower
from dinfer.plan.ops import Op, Value, recv, send
from dinfer.plan.partition import Shape
from dinfer.plan.plan import Lane, OpPlace, Plan
from dinfer.plan.schedule import SCHEDULES, STRATEGIES, build

Shapes = st.SearchStrategy[Shape]
Lanes = list[list[tuple[str, list[Op]]]]
"""The lanes of a plan, to be edited."""
Mutation = Callable[[st.DrawFn, Plan, Lanes], None]

SAFE_SCHEDULES: tuple[Schedule, ...] = ("pipelined", "lockstep")


@st.composite
def shapes(
    draw: st.DrawFn, *, ranks: int = 4, layers: int = 7, chunks: int = 4, chunk_size: int = 3
) -> Shape:
    """Any shape up to these sizes: uneven stages, a shorter last chunk, a prompt shorter than one chunk, chunks of
    different lengths."""
    world_size = draw(st.integers(1, ranks))
    total = draw(st.integers(world_size, max(layers, world_size)))
    size = draw(st.integers(1, chunk_size))
    tokens = draw(st.integers(1, size * chunks))
    made = draw(shapes_of(world_size, layers=total, tokens=tokens, chunk_size=size))
    lengths = tuple(draw(st.lists(st.integers(1, chunk_size), max_size=chunks)))
    if len(lengths) < 2:
        return made
    return replace(made, tokens=sum(lengths), chunk_size=max(lengths), lengths=lengths)


def shapes_of(world_size: int, *, layers: int, tokens: int, chunk_size: int) -> Shapes:
    """Any stages, in a shape that is given but for them."""
    later = st.permutations(range(1, layers)).map(lambda order: sorted(order[: world_size - 1]))
    return later.map(lambda starts: Shape(layers, tokens, chunk_size, (0, *starts)))


ANY, SMALL = shapes(), shapes(ranks=3, layers=4, chunks=3)


@st.composite
def plans(draw: st.DrawFn, of: Shapes = ANY, *, schedules: tuple[Schedule, ...] = tuple(SCHEDULES)) -> Plan:
    """A plan as it is built."""
    schedule, strategy = draw(st.sampled_from(schedules)), draw(st.sampled_from(tuple(STRATEGIES)))
    return build(draw(of), schedule, strategy)


def safe_plans(*, ranks: int = 4, layers: int = 5) -> st.SearchStrategy[Plan]:
    """Plans that verify proves."""
    return plans(shapes(ranks=ranks, layers=layers, chunks=3), schedules=SAFE_SCHEDULES)


@st.composite
def mutated_plans(draw: st.DrawFn, of: Shapes = SMALL, *, most: int = 2) -> Plan:
    """A plan of any schedule with up to `most` edits; some leave it as good as it was."""
    return _edited(draw, draw(plans(of)), MUTATIONS, most)


@st.composite
def reordered_plans(draw: st.DrawFn, *, most: int = 3) -> Plan:
    """A plan whose only mistakes are of order: most of those that hang are among them."""
    return _edited(draw, draw(plans(shapes(layers=5, chunks=2))), (move, swap), most)


@st.composite
def reordered_issues(draw: st.DrawFn, *, most: int = 2) -> Plan:
    """A lowered plan whose only mistakes are of order."""
    plan = draw(plans(shapes(ranks=3, layers=4, chunks=2), schedules=SAFE_SCHEDULES))
    return _edited(draw, lower(plan), (move, swap), most)


def _edited(draw: st.DrawFn, plan: Plan, mutations: Sequence[Mutation], most: int) -> Plan:
    for _ in range(draw(st.integers(1, most), label="edits")):
        mutate = draw(st.sampled_from(mutations))
        lanes: Lanes = [[(lane.name, list(lane.ops)) for lane in rank] for rank in plan.lanes]
        mutate(draw, plan, lanes)
        plan = replace(plan, lanes=tuple(tuple(Lane(n, tuple(ops)) for n, ops in rank) for rank in lanes))
    return plan


def _place(draw: st.DrawFn, plan: Plan, *, transfer: bool = False) -> OpPlace | None:
    found = [place for place, op in plan.places() if op.is_transfer or not transfer]
    return draw(st.sampled_from(found)) if found else None


def _ops(lanes: Lanes, place: OpPlace) -> list[Op]:
    return lanes[place.rank][place.lane][1]


def drop(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    if place := _place(draw, plan):
        del _ops(lanes, place)[place.index]


def drop_both_ends(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    if place := _place(draw, plan, transfer=True):
        graph = Graph(plan)
        number = graph.first[graph.first_lane[place.rank] + place.lane] + place.index
        partner = graph.partner[number]
        for end in sorted({place, place if partner == NONE else graph.place(partner)}, reverse=True):
            del _ops(lanes, end)[end.index]


def duplicate(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    if place := _place(draw, plan):
        ops = _ops(lanes, place)
        ops.insert(draw(st.integers(0, len(ops))), plan.op(place))


def move(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    """To another place on the same lane."""
    if place := _place(draw, plan):
        ops = _ops(lanes, place)
        ops.insert(draw(st.integers(0, len(ops) - 1)), ops.pop(place.index))


def swap(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    """With another op of the same lane; half of the time with the next."""
    if place := _place(draw, plan):
        ops = _ops(lanes, place)
        last = len(ops) - 1
        other = draw(st.just(min(place.index + 1, last)) | st.integers(0, last))
        ops[place.index], ops[other] = ops[other], ops[place.index]


def move_to_lane(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    """To a lane of any rank."""
    if place := _place(draw, plan):
        op = _ops(lanes, place).pop(place.index)
        rank = draw(st.sampled_from(lanes))
        ops = draw(st.sampled_from(rank))[1]
        ops.insert(draw(st.integers(0, len(ops))), op)


def merge_lanes(draw: st.DrawFn, _: Plan, lanes: Lanes) -> None:
    """Two lanes of a rank become one, their ops shuffled together in order."""
    rank = draw(st.sampled_from(lanes))
    if len(rank) > 1:
        first, second = rank[0][1], rank.pop(draw(st.integers(1, len(rank) - 1)))[1]
        for gap in accumulate(draw(st.lists(st.integers(1, 4), min_size=len(second), max_size=len(second)))):
            first.insert(gap, second.pop(0))


def retarget(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    if place := _place(draw, plan, transfer=True):
        peer = draw(st.integers(0, plan.world_size))
        _ops(lanes, place)[place.index] = plan.op(place)._replace(peer=peer)


def resize(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    if place := _place(draw, plan, transfer=True):
        tokens = draw(st.integers(0, plan.shape.chunk_size + 1))
        _ops(lanes, place)[place.index] = plan.op(place)._replace(tokens=tokens)


def rename(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    """Another chunk or layer, out of range too."""
    if (place := _place(draw, plan)) and (op := plan.op(place)).what != "final":
        chunk = draw(st.integers(0, len(plan.shape.chunks)))
        layer = op.layer if op.kind == "embed" else draw(st.integers(0, plan.shape.layers + 1))
        _ops(lanes, place)[place.index] = op._replace(chunk=chunk, layer=layer)


def add_transfer(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    """A hidden state for a rank that has no use for it: needless, but not wrong."""
    source, target = draw(st.permutations(range(plan.world_size)))[:2] if plan.world_size > 1 else (0, 0)
    value = Value(
        "hidden", draw(st.integers(0, len(plan.shape.chunks) - 1)), draw(st.integers(0, plan.shape.layers))
    )
    tokens = len(plan.shape.chunks[value.chunk])
    for rank, op in ((source, send(value, target, tokens)), (target, recv(value, source, tokens))):
        ops = draw(st.sampled_from(lanes[rank]))[1]
        ops.insert(draw(st.sampled_from((0, len(ops)))), op)


def add_embed(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    ops = draw(st.sampled_from(draw(st.sampled_from(lanes))))[1]
    ops.insert(draw(st.integers(0, len(ops))), Op("embed", draw(st.integers(0, len(plan.shape.chunks) - 1))))


MUTATIONS: tuple[Mutation, ...] = (
    drop,
    drop_both_ends,
    duplicate,
    move,
    swap,
    move_to_lane,
    merge_lanes,
    retarget,
    resize,
    rename,
    add_transfer,
    add_embed,
)

"""Plans with mistakes in them: small edits drawn by hypothesis. Not a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

from hypothesis import strategies as st

from dinfer.plan.graph import NONE, Graph
from dinfer.plan.ops import Op, Value, embed, recv, send
from dinfer.plan.partition import partition
from dinfer.plan.plan import Lane, Place, Plan
from dinfer.plan.schedule import SCHEDULES, build
from dinfer.plan.sync import STRATEGIES

Lanes = list[list[tuple[str, list[Op]]]]
"""The lanes of a plan, to be edited."""
Mutation = Callable[[st.DrawFn, Plan, Lanes], None]

LAYERS, TOKENS, CHUNK = 3, 5, 2


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan as it is built: of any schedule, sync strategy and number of ranks."""
    world_size = draw(st.integers(1, 3), label="world_size")
    splits = [tuple(range(1, world_size)), tuple(range(LAYERS - world_size + 1, LAYERS))]
    shape = partition(
        layers=LAYERS,
        tokens=TOKENS,
        world_size=world_size,
        chunk_size=CHUNK,
        layer_split=draw(st.sampled_from(splits), label="layer_split"),
    )
    schedule = draw(st.sampled_from(tuple(SCHEDULES)), label="schedule")
    return build(shape, schedule, draw(st.sampled_from(tuple(STRATEGIES)), label="sync_strategy"))


@st.composite
def mutated_plans(draw: st.DrawFn, most: int = 2) -> Plan:
    """A plan with up to `most` edits; some leave it as good as it was."""
    plan = draw(plans())
    for _ in range(draw(st.integers(1, most), label="edits")):
        mutate = draw(st.sampled_from(MUTATIONS))
        lanes: Lanes = [[(lane.name, list(lane.ops)) for lane in rank] for rank in plan.lanes]
        mutate(draw, plan, lanes)
        plan = replace(plan, lanes=tuple(tuple(Lane(n, tuple(ops)) for n, ops in rank) for rank in lanes))
    return plan


def _place(draw: st.DrawFn, plan: Plan, *, transfer: bool = False) -> Place | None:
    found = [place for place, op in plan.places() if op.is_transfer or not transfer]
    return draw(st.sampled_from(found)) if found else None


def _ops(lanes: Lanes, place: Place) -> list[Op]:
    return lanes[place.rank][place.lane][1]


def drop(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    if place := _place(draw, plan):
        del _ops(lanes, place)[place.index]


def drop_both_ends(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    if place := _place(draw, plan, transfer=True):
        graph = Graph(plan)
        number = next(n for n in range(len(graph.ops)) if graph.place(n) == place)
        ends = [place, *([graph.place(graph.partner[number])] if graph.partner[number] != NONE else [])]
        for end in sorted(ends, reverse=True):
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
    """With the op after it."""
    if (place := _place(draw, plan)) and place.index + 1 < len(ops := _ops(lanes, place)):
        ops[place.index], ops[place.index + 1] = ops[place.index + 1], ops[place.index]


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
        _ops(lanes, place)[place.index] = plan.op(place)._replace(tokens=draw(st.integers(1, CHUNK + 1)))


def rename(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    """Another chunk or layer, out of range too."""
    if (place := _place(draw, plan)) and (op := plan.op(place)).what != "final":
        chunk = draw(st.integers(0, len(plan.shape.chunks)))
        layer = op.layer if op.kind == "embed" else draw(st.integers(0, LAYERS + 1))
        _ops(lanes, place)[place.index] = op._replace(chunk=chunk, layer=layer)


def add_transfer(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    """A hidden state for a rank that has no use for it: needless, but not wrong."""
    source, target = draw(st.permutations(range(plan.world_size)))[:2] if plan.world_size > 1 else (0, 0)
    value = Value("hidden", draw(st.integers(0, len(plan.shape.chunks) - 1)), draw(st.integers(0, LAYERS)))
    tokens = len(plan.shape.chunks[value.chunk])
    for rank, op in ((source, send(value, target, tokens)), (target, recv(value, source, tokens))):
        ops = draw(st.sampled_from(lanes[rank]))[1]
        ops.insert(draw(st.sampled_from((0, len(ops)))), op)


def add_embed(draw: st.DrawFn, plan: Plan, lanes: Lanes) -> None:
    ops = draw(st.sampled_from(draw(st.sampled_from(lanes))))[1]
    ops.insert(draw(st.integers(0, len(ops))), embed(draw(st.integers(0, len(plan.shape.chunks) - 1))))


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

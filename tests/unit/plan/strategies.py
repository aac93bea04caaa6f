"""Shapes, plans and plans with mistakes, for hypothesis. Not a test; engine tests use it as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hypothesis import strategies as st

from dinfer.config import Schedule
from dinfer.plan.ops import Op
from dinfer.plan.partition import Shape
from dinfer.plan.plan import Lane, Place, Plan
from dinfer.plan.schedule import SCHEDULES, build
from dinfer.plan.sync import STRATEGIES

SAFE_SCHEDULES: tuple[Schedule, ...] = ("pipelined", "lockstep")


@st.composite
def shapes(
    draw: st.DrawFn, *, ranks: int = 4, layers: int = 7, chunks: int = 4, chunk_size: int = 3
) -> Shape:
    """Any shape up to these sizes: uneven stages, a shorter last chunk, a prompt shorter than one chunk."""
    world_size = draw(st.integers(1, ranks))
    total = draw(st.integers(world_size, max(layers, world_size)))
    later = draw(st.permutations(range(1, total)))[: world_size - 1]
    size = draw(st.integers(1, chunk_size))
    return Shape(total, draw(st.integers(1, size * chunks)), size, (0, *sorted(later)))


@st.composite
def plans(
    draw: st.DrawFn,
    *,
    schedules: tuple[Schedule, ...] = tuple(SCHEDULES),
    ranks: int = 4,
    layers: int = 7,
    chunks: int = 4,
) -> Plan:
    """A plan as it is built."""
    shape = draw(shapes(ranks=ranks, layers=layers, chunks=chunks))
    return build(shape, draw(st.sampled_from(schedules)), draw(st.sampled_from(tuple(STRATEGIES))))


def safe_plans(*, ranks: int = 4, layers: int = 5, chunks: int = 3) -> st.SearchStrategy[Plan]:
    """Plans that verify proves."""
    return plans(schedules=SAFE_SCHEDULES, ranks=ranks, layers=layers, chunks=chunks)


@st.composite
def drop(draw: st.DrawFn, plan: Plan) -> Plan:
    """Without one op."""
    place = draw(_places(plan))
    return _edit(plan, place, lambda ops: ops.pop(place.index))


@st.composite
def duplicate(draw: st.DrawFn, plan: Plan) -> Plan:
    """One op twice in a row."""
    place = draw(_places(plan))
    return _edit(plan, place, lambda ops: ops.insert(place.index, ops[place.index]))


@st.composite
def swap(draw: st.DrawFn, plan: Plan) -> Plan:
    """Two ops of a lane change places."""
    place = draw(_places(plan))
    other = draw(st.integers(0, len(plan.lanes[place.rank][place.lane].ops) - 1))

    def exchange(ops: list[Op]) -> None:
        ops[place.index], ops[other] = ops[other], ops[place.index]

    return _edit(plan, place, exchange)


@st.composite
def move(draw: st.DrawFn, plan: Plan) -> Plan:
    """One op goes to another place in its lane."""
    place = draw(_places(plan))
    target = draw(st.integers(0, len(plan.lanes[place.rank][place.lane].ops) - 1))
    return _edit(plan, place, lambda ops: ops.insert(target, ops.pop(place.index)))


@st.composite
def retarget(draw: st.DrawFn, plan: Plan) -> Plan:
    """One transfer has another peer, which may not exist. The plan itself where nothing is transferred."""
    place = draw(_places(plan, transfers=True))
    return plan if place is None else _change(plan, place, peer=draw(st.integers(0, plan.world_size)))


@st.composite
def resize(draw: st.DrawFn, plan: Plan) -> Plan:
    """One transfer has another size. The plan itself where nothing is transferred."""
    place = draw(_places(plan, transfers=True))
    return plan if place is None else _change(plan, place, tokens=draw(st.integers(0, 4)))


@st.composite
def rename(draw: st.DrawFn, plan: Plan) -> Plan:
    """One op is for another chunk or layer, which may not exist."""
    place = draw(_places(plan))
    op = plan.op(place)
    if op.what == "final":
        return plan
    chunk = draw(st.integers(0, len(plan.shape.chunks)))
    layer = op.layer if op.kind == "embed" else draw(st.integers(0, plan.shape.layers + 1))
    return _change(plan, place, chunk=chunk, layer=layer)


def mutations(plan: Plan) -> st.SearchStrategy[Plan]:
    """`plan` with one edit. Some edits leave it as good as it was."""
    kinds = (drop, duplicate, swap, move, retarget, resize, rename)
    return st.one_of([kind(plan) for kind in kinds])


@st.composite
def mutated_plans(draw: st.DrawFn, *, most: int = 2, ranks: int = 3, layers: int = 4) -> Plan:
    """A plan of any schedule with up to `most` edits; none is possible."""
    plan = draw(plans(ranks=ranks, layers=layers, chunks=3))
    for _ in range(draw(st.integers(0, most))):
        if any(True for _ in plan.places()):
            plan = draw(mutations(plan))
    return plan


@st.composite
def reordered_plans(draw: st.DrawFn, *, most: int = 3) -> Plan:
    """A plan whose only mistakes are of order: most of those that hang are among them."""
    plan = draw(plans(ranks=4, layers=5, chunks=2))
    for _ in range(draw(st.integers(1, most))):
        plan = draw(st.one_of(swap(plan), move(plan)))
    return plan


def _places(plan: Plan, *, transfers: bool = False) -> st.SearchStrategy[Place]:
    found = [place for place, op in plan.places() if op.is_transfer or not transfers]
    return st.sampled_from(found) if found else st.none()  # type: ignore[return-value]


def _change(plan: Plan, place: Place, **fields: int) -> Plan:
    def replace_op(ops: list[Op]) -> None:
        ops[place.index] = ops[place.index]._replace(**fields)  # type: ignore[arg-type]

    return _edit(plan, place, replace_op)


def _edit(plan: Plan, place: Place, edit: Callable[[list[Op]], object]) -> Plan:
    """`plan` with one lane changed by `edit`."""
    lanes = [list(rank) for rank in plan.lanes]
    lane = lanes[place.rank][place.lane]
    ops = list(lane.ops)
    edit(ops)
    lanes[place.rank][place.lane] = Lane(lane.name, tuple(ops))
    return replace(plan, lanes=tuple(tuple(rank) for rank in lanes))

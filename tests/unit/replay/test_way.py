"""The positions that one rank alone is stepped through: those that the run's steps gave it, up to the record's end."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from dinfer.plan.cut import UNITS, Cuts
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import Shape
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.saved.replay.record import ReplayPath, is_inside, lower

SHAPE = Shape(6, 10, 4, (0, 2, 4))


@pytest.fixture(params=["pipelined", "lockstep"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return build(SHAPE, request.param, "ring")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("seed", range(3))
def test_steps_go_on_to_the_end_and_back_to_the_start(plan: Plan, unit: str, seed: int) -> None:
    cuts, draw = Cuts(plan), Random(seed)
    cut = draw.choice(cuts.chain("layer"))
    way = ReplayPath(plan, 1, cut[1])
    on = [way.start]
    while (further := way.next(on[-1], unit)) != on[-1]:  # type: ignore[arg-type]
        on.append(further)
    back = [way.reach]
    while (nearer := way.previous(back[-1], unit)) != back[-1]:  # type: ignore[arg-type]
        back.append(nearer)
    assert on[0] == back[-1] == way.start
    assert on == back[::-1]
    assert on[-1] == way.reach == cut[1]
    assert all(is_inside(one, other) and one != other for one, other in pairwise(on))


def test_steps_meet_the_run_s_own_cuts(plan: Plan) -> None:
    cuts = Cuts(plan)
    way = ReplayPath(plan, 2, cuts.end[2])
    cut, at = cuts.start, way.start
    for _ in range(4):
        while cut[2] == at:
            cut = cuts.next(cut, "layer")
        at = way.next(at, "layer")
        assert at == cut[2]


def test_a_block_beyond_the_record_ends_where_the_record_does(plan: Plan) -> None:
    cuts = Cuts(plan)
    reach = cuts.after_block(0, 3)[1]
    way = ReplayPath(plan, 1, reach)
    assert way.after_block(2, 5) == reach
    assert way.after_block(0, 1) == lower(cuts.after_block(0, 1)[1], reach)
    with pytest.raises(PlanError, match="there is no block c9 l0"):
        way.after_block(9, 0)


def test_a_place_that_the_plan_does_not_lead_to(plan: Plan) -> None:
    lanes = plan.lanes[1]
    layer = next(n for n, lane in enumerate(lanes) if any(op.kind == "layer" for op in lane.ops))
    reach = tuple(len(lane.ops) if n == layer else 0 for n, lane in enumerate(lanes))
    if len(lanes) == 1:
        assert ReplayPath(plan, 1, reach).chain("op")[-1] == reach
    else:
        with pytest.raises(PlanError, match="rank 1 cannot have come to"):
            ReplayPath(plan, 1, reach).chain("op")


def test_a_refuted_plan_is_stepped_by_op_alone() -> None:
    plan = build(SHAPE, "batched", "pairwise")
    way = ReplayPath(plan, 0, tuple(2 for _ in plan.lanes[0]))
    assert len(way.chain("op")) == 1 + sum(way.reach)
    with pytest.raises(PlanError, match="step by op, or resume"):
        way.next(way.start, "layer")

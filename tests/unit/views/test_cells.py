"""Cells against the plainest reading of the plan, on any plan and any stand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dinfer.engine.board import Stand
from dinfer.plan.cut import Cuts
from dinfer.plan.ops import Value
from dinfer.plan.plan import Plan
from dinfer.views.cells import COMPUTING, EVERYWHERE, HERE, IN_FLIGHT, NOT_YET, CellMap, cut_line
from tests.support.plan_strategies import plans, safe_plans


@st.composite
def stands_of(draw: st.DrawFn, plan: Plan) -> list[Stand]:
    """Any positions, begun ops among them; also such as no run could reach."""
    stands = []
    for lanes in plan.lanes:
        positions = [draw(st.integers(0, len(lane.ops))) for lane in lanes]
        more = [position < len(lane.ops) for position, lane in zip(positions, lanes, strict=True)]
        started = [can and draw(st.booleans()) for can in more]
        stands.append(Stand(tuple(positions), tuple(started), tuple(positions)))
    return stands


def naive_state(plan: Plan, stands: Sequence[Stand], layer: int, chunk: int, rank: int) -> int:
    """The state of one cell, from the ops that are in on each rank."""
    block = Value("kv", chunk, layer)
    holders = [
        any(
            block in op.makes()
            for lane, position in zip(lanes, stand.positions, strict=True)
            for op in lane.ops[:position]
        )
        for lanes, stand in zip(plan.lanes, stands, strict=True)
    ]
    begun = [
        lane.ops[position]
        for lane, position, started in zip(
            plan.lanes[rank], stands[rank].positions, stands[rank].started, strict=True
        )
        if started
    ]
    if all(holders):
        return EVERYWHERE
    if holders[rank]:
        return HERE
    if any(op.kind == "layer" and block in op.makes() for op in begun):
        return COMPUTING
    return IN_FLIGHT if any(holders) else NOT_YET


@given(st.data())
def test_every_cell_is_what_the_ops_that_are_in_say(data: st.DataObject) -> None:
    plan = data.draw(plans())
    stands = data.draw(stands_of(plan))
    states = CellMap(plan).states(stands)
    assert states.dtype == np.uint8
    for layer, chunk, rank in np.ndindex(states.shape):
        assert states[layer, chunk, rank] == naive_state(plan, stands, layer, chunk, rank)


@given(safe_plans(), st.sampled_from(["op", "layer", "wave", "chunk"]))
def test_at_every_cut_the_line_is_a_staircase_between_computed_and_not(plan: Plan, unit: str) -> None:
    cuts, cells = Cuts(plan), CellMap(plan)
    cut, last = cuts.start, None
    while cut != last:
        stands = [Stand(lanes, (False,) * len(lanes), lanes) for lanes in cut]
        states = cells.states(stands)
        depths = cut_line(states)
        assert depths == sorted(depths, reverse=True)
        for chunk, depth in enumerate(depths):
            assert (states[:depth, chunk] != NOT_YET).all()
            assert (states[depth:, chunk] == NOT_YET).all()
        cut, last = cuts.next(cut, unit), cut  # type: ignore[arg-type]
    assert (states == EVERYWHERE).all()


@given(safe_plans())
def test_after_a_layer_step_no_rank_waits_for_a_block(plan: Plan) -> None:
    cells = CellMap(plan)
    for n, cut in enumerate(Cuts(plan).chain("layer")):
        states = cells.states([Stand(lanes, (False,) * len(lanes), lanes) for lanes in cut])
        assert not np.isin(states, (COMPUTING, IN_FLIGHT)).any()
        assert (states == EVERYWHERE).all(axis=2).sum() == n

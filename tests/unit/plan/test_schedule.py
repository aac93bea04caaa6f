"""lockstep, pipelined, batched: which op goes on which lane, and golden plans; pairwise and ring: the hops of a block.

`DINFER_UPDATE_GOLDEN=1` writes the golden files anew.
"""

import os
from difflib import unified_diff
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given

from dinfer.config import Schedule, SyncStrategy
from dinfer.plan.cut import Cuts
from dinfer.plan.ops import Op, PlanError
from dinfer.plan.partition import Shape, partition
from dinfer.plan.plan import Plan, parse_plan
from dinfer.plan.schedule import SCHEDULES, STRATEGIES, build, compute_order, pairwise, ring
from tests.support.plan_strategies import plans, safe_plans, shapes

GOLDEN = Path(__file__).parent / "golden"
SMALL = partition(layers=4, tokens=5, world_size=3, chunk_size=2)
SIZES = [(owner, world_size) for world_size in range(1, 17) for owner in range(world_size)]
COMBINATIONS = [(schedule, strategy) for schedule in SCHEDULES for strategy in STRATEGIES]


@pytest.mark.parametrize(("schedule", "strategy"), COMBINATIONS)
def test_golden(schedule: Schedule, strategy: SyncStrategy) -> None:
    path = GOLDEN / f"{schedule}-{strategy}.txt"
    text = build(SMALL, schedule, strategy).text()
    if os.environ.get("DINFER_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    golden = path.read_text(encoding="utf-8")
    lines = golden.splitlines(), text.splitlines()
    assert text == golden, "\n" + "\n".join(unified_diff(*lines, str(path), "now", lineterm=""))


def test_there_is_one_golden_file_for_each_combination() -> None:
    expected = sorted(f"{schedule}-{strategy}.txt" for schedule, strategy in COMBINATIONS)
    assert sorted(path.name for path in GOLDEN.iterdir()) == expected


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_golden_files_can_be_read_back(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert parse_plan(text).text() == text


@given(plans(shapes(ranks=5)))
def test_ops_are_what_the_shape_calls_for(plan: Plan) -> None:
    ops = [op for _, op in plan.places()]
    shape, others = plan.shape, plan.world_size - 1
    chunks = len(shape.chunks)
    assert count(ops, "embed") == chunks
    assert count(ops, "layer") == shape.blocks
    assert count(ops, "norm") == 1
    for kind in ("send", "recv"):
        assert count(ops, kind, "kv") == others * shape.blocks
        assert count(ops, kind, "hidden") == others * chunks
        assert count(ops, kind, "final") == others


@given(plans(shapes(ranks=5)))
def test_each_rank_computes_the_layers_of_its_stage(plan: Plan) -> None:
    for rank, stage in enumerate(plan.shape.stages):
        computed = [op.layer for lane in plan.lanes[rank] for op in lane.ops if op.kind == "layer"]
        assert computed == [*stage] * len(plan.shape.chunks)


@given(plans(schedules=("lockstep", "batched")))
def test_lockstep_and_batched_have_one_lane_a_rank(plan: Plan) -> None:
    assert [[lane.name for lane in lanes] for lanes in plan.lanes] == [["main"]] * plan.world_size


@given(plans(shapes(ranks=5), schedules=("pipelined",)))
def test_pipelined_lanes_carry_one_kind_of_thing(plan: Plan) -> None:
    for lanes in plan.lanes:
        for lane in lanes:
            assert all(lane_of(op) == lane.name for op in lane.ops), lane.name


@given(plans(shapes(ranks=5), schedules=("pipelined",)))
def test_pipelined_kv_lanes_carry_blocks_in_the_global_order(plan: Plan) -> None:
    order = {block: at for at, block in enumerate(compute_order(plan.shape))}
    for lanes in plan.lanes:
        for lane in lanes:
            if lane.name.startswith("kv"):
                carried = [order[op.chunk, op.layer] for op in lane.ops]
                assert carried == sorted(carried)


@given(shapes(ranks=6, layers=12))
def test_the_global_order_extends_the_data_flow(shape: Shape) -> None:
    order = {block: at for at, block in enumerate(compute_order(shape))}
    assert len(order) == shape.blocks
    for (chunk, index), at in order.items():
        assert order.get((chunk, index - 1), -1) < at
        assert order.get((chunk - 1, index), -1) < at


@given(safe_plans())
def test_the_order_of_pipelined_plans_and_that_of_their_cuts_are_one(plan: Plan) -> None:
    if plan.schedule == "pipelined":
        assert Cuts(plan).blocks == compute_order(plan.shape)


def test_the_global_order_by_hand() -> None:
    # Rank 0 owns layers 0 and 1, rank 1 owns layer 2; each line is one unit of time.
    assert compute_order(Shape(3, 2, 1, (0, 2))) == [
        *[(0, 0)],
        *[(0, 1)],
        *[(0, 2), (1, 0)],
        *[(1, 1)],
        *[(1, 2)],
    ]


def test_batched_sends_before_it_receives() -> None:
    plan = build(Shape(3, 1, 1, (0, 1, 2)), "batched", "pairwise")
    kinds = [op.kind for op in plan.lanes[1][0].ops]
    assert kinds == ["recv", "layer", "send", "send", "recv", "send", "recv", "recv"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_rank_only_computes(schedule: Schedule) -> None:
    plan = build(Shape(2, 3, 2, (0,)), schedule, "ring")
    ((lane,),) = plan.lanes
    assert [str(op) for op in lane.ops] == [
        *["embed c0", "layer c0 l0", "layer c0 l1"],
        *["embed c1", "layer c1 l0", "layer c1 l1", "norm c1 l2"],
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("eager", "ring"), "'eager' is unknown; it must be one of pipelined, lockstep, batched."),
        (("lockstep", "tree"), "'tree' is unknown; it must be one of pairwise, ring."),
    ],
)
def test_unknown_names(names: tuple[str, str], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        build(SMALL, *cast("tuple[Any, Any]", names))
    assert str(caught.value) == message


def count(ops: list[Op], kind: str, what: str | None = None) -> int:
    return sum(op.kind == kind and what in (None, op.what) for op in ops)


def lane_of(op: Op) -> str:
    if not op.is_transfer:
        return "compute"
    way = "out" if op.kind == "send" else "in"
    return f"kv-{way}:{op.peer}" if op.what == "kv" else f"hidden-{way}"


def test_pairwise_by_hand() -> None:
    assert pairwise(1, 4) == [(1, 2), (1, 3), (1, 0)]


def test_ring_by_hand() -> None:
    assert ring(2, 4) == [(2, 3), (3, 0), (0, 1)]


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_one_rank_has_nobody_to_sync_with(strategy: SyncStrategy) -> None:
    assert STRATEGIES[strategy](0, 1) == []


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_every_rank_gets_the_block_once_from_one_that_has_it(strategy: SyncStrategy) -> None:
    for owner, world_size in SIZES:
        having = [owner]
        for source, target in STRATEGIES[strategy](owner, world_size):
            assert source in having
            assert target not in having
            having.append(target)
        assert sorted(having) == list(range(world_size))


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_the_kth_hops_of_all_owners_use_each_rank_once(strategy: SyncStrategy) -> None:
    for world_size in range(1, 17):
        by_owner = [STRATEGIES[strategy](owner, world_size) for owner in range(world_size)]
        for hops in zip(*by_owner, strict=True):
            assert sorted(source for source, _ in hops) == list(range(world_size))
            assert sorted(target for _, target in hops) == list(range(world_size))


def test_in_a_ring_all_send_to_the_right() -> None:
    assert all((a + 1) % n == b for owner, n in SIZES for a, b in ring(owner, n))

"""lower: one lane a rank with the same ops and channels, which no order of streams can hang.

`DINFER_UPDATE_GOLDEN=1` writes the golden file anew.
"""

import os
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import event, given

from dinfer.plan.graph import channel_of
from dinfer.plan.lower import lower
from dinfer.plan.ops import Op, PlanError, Value, parse_op
from dinfer.plan.partition import Shape, partition
from dinfer.plan.plan import Lane, Plan, parse_plan
from dinfer.plan.schedule import build
from dinfer.plan.verify import Counterexample, verify
from tests.support.plan_game import finishes
from tests.support.plan_strategies import SAFE_SCHEDULES, plans, reordered_issues, shapes

GOLDEN = Path(__file__).parent / "lowered-pipelined-ring.txt"
EIGHT = shapes(ranks=8, layers=10, chunks=4)


def test_golden() -> None:
    text = lower(build(partition(layers=4, tokens=5, world_size=3, chunk_size=2), "pipelined", "ring")).text()
    if os.environ.get("DINFER_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
    assert parse_plan(text).text() == text
    assert parse_plan(text).is_lowered


@given(plans(EIGHT, schedules=SAFE_SCHEDULES))
def test_what_is_proved_is_proved_lowered(plan: Plan) -> None:
    lowered = lower(plan)
    assert lowered.is_lowered
    assert verify(lowered).proved
    assert lower(lowered) == lowered


@given(plans(shapes(ranks=8, layers=8, chunks=2), schedules=("batched",)))
def test_batched_stays_refuted(plan: Plan) -> None:
    verdict = verify(lower(plan))
    assert verdict.proved is (plan.world_size == 1)
    if isinstance(verdict, Counterexample):
        assert verdict.flaw in ("pair order", "cycle")


@given(plans(EIGHT, schedules=SAFE_SCHEDULES))
def test_every_lane_keeps_its_ops_in_their_order(plan: Plan) -> None:
    for lanes, (issue,) in zip(plan.lanes, lower(plan).lanes, strict=True):
        assert len(issue.ops) == sum(len(lane.ops) for lane in lanes)
        for lane in lanes:
            assert [op for op in issue.ops if op in set(lane.ops)] == list(lane.ops)


@given(plans(EIGHT, schedules=SAFE_SCHEDULES))
def test_each_pair_issues_in_one_order_on_each_communicator(plan: Plan) -> None:
    lowered = lower(plan)
    for low, high in combinations(range(plan.world_size), 2):
        for communicator in ("hidden", "kv"):
            orders = [
                [
                    (channel_of(rank, op), op.value)
                    for op in lowered.lanes[rank][0].ops
                    if op.is_transfer and op.peer == peer and op.communicator == communicator
                ]
                for rank, peer in ((low, high), (high, low))
            ]
            assert orders[0] == orders[1]


@given(plans(shapes(ranks=5, layers=7), schedules=("pipelined",)))
def test_blocks_go_a_chunk_behind_hidden_states(plan: Plan) -> None:
    """A rank issues none of its own blocks before the chunk's hidden state has been issued on its way."""
    for rank, (issue,) in enumerate(lower(plan).lanes[:-1]):
        at = {op: number for number, op in enumerate(issue.ops)}
        leaving = plan.shape.stages[rank].stop
        for op in issue.ops:
            if op.kind == "send" and op.what == "kv" and op.layer in plan.shape.stages[rank]:
                assert at[op] > at[hidden_of(plan, op.chunk, leaving, rank + 1)]


def hidden_of(plan: Plan, chunk: int, layer: int, peer: int) -> Op:
    tokens = len(plan.shape.chunks[chunk])
    plural = "" if tokens == 1 else "s"
    return parse_op(f"send {Value('hidden', chunk, layer)} -> {peer}, {tokens} token{plural}")


def test_a_plan_that_can_hang_has_no_order_to_issue_it_in() -> None:
    plan = build(Shape(2, 4, 2, (0, 1)), "pipelined", "pairwise")
    compute, *others = plan.lanes[0]
    first, *rest = compute.ops
    late = Lane(compute.name, (*rest, first))
    with pytest.raises(PlanError, match="this plan can hang, so it cannot be lowered"):
        lower(replace(plan, lanes=((late, *others), *plan.lanes[1:])))


def test_a_pair_that_issues_in_two_orders_is_told_in_words() -> None:
    text = lower(build(Shape(2, 2, 2, (0, 1)), "lockstep", "pairwise")).text()
    sent, received = "  send kv c0 l0 -> 1, 2 tokens\n", "  recv kv c0 l1 <- 1, 2 tokens\n"
    assert sent in text
    swapped = text.replace(received, "").replace(sent, received + sent)
    verdict = verify(parse_plan(swapped))
    assert str(verdict) == (
        "refuted (pair order): rank 0 issues `recv kv c0 l1 <- 1, 2 tokens` before "
        "`send kv c0 l0 -> 1, 2 tokens`; rank 1 issues `recv kv c0 l0 <- 0, 2 tokens` before "
        "`send kv c0 l1 -> 0, 2 tokens`; on the kv communicator NCCL runs each rank's transfers with a peer in the "
        "order in which it issues them, so the two ranks deadlock"
    )
    other_lane = verify(parse_plan(swapped.replace("lane issue", "lane main")))
    assert isinstance(other_lane, Counterexample)
    assert other_lane.flaw == "cycle"


@given(reordered_issues())
def test_a_lowered_plan_is_proved_if_and_only_if_it_runs_serially(plan: Plan) -> None:
    verdict = verify(plan)
    event("proved" if verdict.proved else verdict.flaw)
    if verdict.proved or verdict.flaw in ("pair order", "cycle"):
        assert finishes(plan, rendezvous=True, seed=0) is verdict.proved

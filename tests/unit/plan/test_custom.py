"""Custom schedules: what a function may return, and the errors for anything else."""

import pytest

from dinfer.config import Config
from dinfer.plan.custom import custom_plan
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import Shape, partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.plan.verify import verify

SHAPE = partition(layers=4, tokens=8, world_size=2, chunk_size=4)
CONFIG = Config(world_size=2, chunk_size=4, prompt_ids=(1,))
LOCKSTEP = build(SHAPE, "lockstep", "pairwise")


def as_lanes(config: Config, shape: Shape) -> list[dict[str, list[str]]]:
    """A schedule of one's own: here, lockstep's ops as text."""
    built = build(shape, "lockstep", config.sync_strategy)
    return [{lane.name: [str(op) for op in lane.ops] for lane in lanes} for lanes in built.lanes]


def test_a_function_gives_lanes_a_plan_or_its_text() -> None:
    made = custom_plan(as_lanes, CONFIG, SHAPE)
    assert made.lanes == LOCKSTEP.lanes
    assert (made.schedule, verify(made).proved) == ("as_lanes", True)
    assert custom_plan(lambda _, shape: build(shape, "lockstep", "pairwise"), CONFIG, SHAPE) == LOCKSTEP
    assert custom_plan(lambda *_: LOCKSTEP.text(), CONFIG, SHAPE) == LOCKSTEP
    assert custom_plan(
        lambda *_: [{"main": list(lanes[0].ops)} for lanes in LOCKSTEP.lanes], CONFIG, SHAPE
    ).lanes == (LOCKSTEP.lanes)


def test_a_plan_or_its_text_needs_no_function() -> None:
    assert custom_plan(LOCKSTEP, CONFIG, SHAPE) is LOCKSTEP
    assert custom_plan(LOCKSTEP.text(), CONFIG, SHAPE) == LOCKSTEP


OTHER = partition(layers=4, tokens=9, world_size=2, chunk_size=4)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            None,
            r"wrong\(…\) returned None; it must return a Plan, a plan's text, or a list with a dict for each rank",
        ),
        ([["embed c0"]], r"returned \[\['embed c0'\]\]; it must return"),
        ([{}], "has lanes for 1 ranks; this run has 2"),
        ([{"a b": []}, {}], "rank 0, lane 'a b': a lane's name must be one word"),
        ([{}, {3: []}], "rank 1, lane 3: a lane's name must be one word"),
        ([{"main": "embed c0"}, {}], "rank 0, lane 'main': its ops are 'embed c0'; they must be a list"),
        ([{"main": ["embed c0", 5]}, {}], "lane 'main', op 1 is 5; it must be an Op or its text"),
        ([{"main": ["embed c0", "dance"]}, {}], "lane 'main', op 1: 'dance' is not an op. Examples of ops:"),
        ("dinfer plan 2", "this is not a plan"),
        (
            build(OTHER, "lockstep", "ring"),
            "is for 4 layers, 9 tokens and 2 ranks; this run has 4 layers, 8 tokens",
        ),
    ],
)
def test_what_is_no_plan_is_told_with_its_place(made: object, words: str) -> None:
    def wrong(_: Config, __: Shape) -> object:
        return made

    with pytest.raises(PlanError, match=words):
        custom_plan(wrong, CONFIG, SHAPE)


def test_what_a_function_raises_comes_through() -> None:
    def broken(_: Config, __: Shape) -> Plan:
        raise KeyError("layer")

    with pytest.raises(KeyError, match="layer"):
        custom_plan(broken, CONFIG, SHAPE)

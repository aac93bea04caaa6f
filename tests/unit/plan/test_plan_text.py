"""The text form of plans: a round trip, and every error with its line."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.plan.ops import Op, PlanError
from dinfer.plan.partition import Shape
from dinfer.plan.plan import HEADER, Lane, OpPlace, Plan, parse_plan
from dinfer.plan.schedule import build
from tests.support.facts import has_facts
from tests.support.plan_strategies import mutated_plans, plans, shapes

HEAD = f"""\
{HEADER}
layers 2, tokens 3, chunk_size 2
stages start at 0 1
schedule own, sync_strategy none
"""
PLAN = Plan(Shape(2, 3, 2, (0, 1)), "own", "none", ((Lane("a", (Op("embed", 0), Op("layer", 0, 0))),), ()))
TEXT = HEAD + "rank 0 lane a\n  embed c0\n  layer c0 l0\n"


def test_text() -> None:
    assert PLAN.text() == TEXT


@given(plans(shapes(ranks=5)))
def test_text_and_back(plan: Plan) -> None:
    assert parse_plan(plan.text()) == plan


@given(mutated_plans())
def test_text_and_back_with_mistakes(plan: Plan) -> None:
    assert parse_plan(plan.text()) == plan


def test_comments_empty_lines_and_indentation_do_not_matter() -> None:
    text = "# by hand\n\n" + TEXT.replace("  embed c0", "embed   c0  # the first") + "\n# the end"
    assert parse_plan(text) == PLAN


def test_lanes_may_be_empty_and_ranks_may_come_in_any_order() -> None:
    plan = parse_plan(HEAD + "rank 1 lane x\nrank 0 lane a\nrank 0 lane b\n  embed c0\n")
    assert plan.lanes == ((Lane("a", ()), Lane("b", (Op("embed", 0),))), (Lane("x", ()),))
    assert [*plan.places()] == [(OpPlace(0, 1, 0), Op("embed", 0))]
    assert plan.op(OpPlace(0, 1, 0)) == Op("embed", 0)


SIZES = "layers N, tokens N, chunk_size N[+N…]"
ERRORS = {
    "an empty text": ("", f"this is not a plan: it is empty; the first line of a plan is {HEADER!r}."),
    "another file": ("import torch\n", f"not a plan … 'import torch' … {HEADER!r}"),
    "a later version": (TEXT.replace(HEADER, "dinfer plan 2"), f"not a plan … 'dinfer plan 2' … {HEADER!r}"),
    "half a header": (f"{HEADER}\nlayers 2, tokens 3, chunk_size 2\n", "header … layers, stages and schedule"),
    "sizes": (TEXT.replace("tokens 3", "token 3"), f"line 2 … 'layers 2, token 3, chunk_size 2' … '{SIZES}'"),
    "a size that is no number": (TEXT.replace("tokens 3", "tokens x"), f"lines 2–3 … tokens x … '{SIZES}' … stages"),
    "stages without words": (TEXT.replace("stages start at 0 1", "0 1"), f"lines 2–3 … '0 1' … '{SIZES}' … start"),
    "stages that overlap": (TEXT.replace("at 0 1", "at 0 0"), "lines 2–3 … [0, 0] of 2 … at least one layer"),
    "no tokens": (TEXT.replace("tokens 3", "tokens 0"), "lines 2–3 … tokens is 0 … at least 1"),
    "schedule": (TEXT.replace("schedule own,", "schedules own,"), "line 4 … schedules own, sync_strategy none … NAME'"),
    "an op before any lane": (HEAD + "  embed c0\n", "line 5 … 'embed c0' … 'rank 0 lane compute'"),
    "a lane without a name": (HEAD + "rank 0 lane\n", "line 5 … 'rank 0 lane' … 'rank 0 lane compute'"),
    "a rank that is no number": (HEAD + "rank ² lane a\n", "line 5 … 'rank ² lane a' … 'rank 0 lane compute'"),
    "unknown rank": (HEAD + "rank 2 lane a\n", "line 5 … rank 2 … 2 stages … ranks 0 to 1"),
    "two lanes of one name": (TEXT + "rank 0 lane a\n", "line 8 … rank 0 … 'a'"),
    "no op": (TEXT.replace("layer c0 l0", "layer c0"), "line 7 … 'layer c0' is not an op … 'layer c0 l3'"),
    "lines are counted with comments": ("# a\n\n" + HEAD + "# b\nrank 9 lane a\n", "line 8 … rank 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_names_the_line_and_the_form(name: str) -> None:
    text, facts = ERRORS[name]
    with pytest.raises(PlanError) as caught:
        parse_plan(text)
    assert has_facts(str(caught.value), facts), str(caught.value)


@given(st.data())
def test_a_damaged_text_is_a_plan_or_a_plan_error(data: st.DataObject) -> None:
    text = build(Shape(2, 3, 2, (0, 1)), "lockstep", "ring").text()
    start, stop = sorted(data.draw(st.integers(0, len(text))) for _ in range(2))
    damaged = text[:start] + data.draw(st.text(max_size=5)) + text[stop:]
    with suppress(PlanError):
        assert parse_plan(damaged).world_size > 0


def test_the_id_is_that_of_the_text() -> None:
    plan = build(Shape(2, 3, 2, (0, 1)), "lockstep", "ring")
    assert plan.id == parse_plan(plan.text()).id
    assert plan.id != build(Shape(2, 3, 2, (0, 1)), "lockstep", "pairwise").id
    assert 0 <= plan.id < 2**64


def test_the_id_stays_what_it_is() -> None:
    # Ranks on different machines, or of different versions, compare it.
    assert PLAN.id == int.from_bytes(bytes.fromhex("9d17eb9e9252a461"), "little")


def test_expected_tokens_are_those_of_the_chunk() -> None:
    plan = build(Shape(2, 3, 2, (0, 1)), "lockstep", "ring")
    sizes = {str(op.value): plan.expected_tokens(op) for _, op in plan.places() if op.is_transfer}
    assert sizes["block c0 l1"] == sizes["hidden c0 l1"] == 2
    assert sizes["block c1 l1"] == sizes["final"] == 1

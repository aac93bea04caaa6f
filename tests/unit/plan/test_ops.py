"""Op: what it needs, what it makes, and its text form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.config import Schedule, SyncStrategy
from dinfer.plan.ops import FINAL, Op, PlanError, Value, new_needs, parse_op, recv, send
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from tests.support.facts import has_facts

NUMBERS = st.integers(0, 10**6)
VALUES = st.one_of(
    st.just(FINAL), st.builds(Value, st.sampled_from(["hidden", "kv"]), chunk=NUMBERS, layer=NUMBERS)
)
OPS = st.one_of(
    NUMBERS.map(lambda chunk: Op("embed", chunk)),
    st.builds(
        lambda kind, chunk, layer: Op(kind, chunk, layer),
        st.sampled_from(["layer", "norm"]),
        NUMBERS,
        NUMBERS,
    ),
    st.builds(send, VALUES, NUMBERS, NUMBERS),
    st.builds(recv, VALUES, NUMBERS, NUMBERS),
)

TEXTS = {
    "embed c0": Op("embed", 0),
    "layer c2 l5": Op("layer", 2, 5),
    "norm c7 l36": Op("norm", 7, 36),
    "send kv c0 l5 -> 2, 128 tokens": send(Value("kv", 0, 5), 2, 128),
    "recv kv c0 l5 <- 1, 1 token": recv(Value("kv", 0, 5), 1, 1),
    "send hidden c3 l12 -> 1, 64 tokens": send(Value("hidden", 3, 12), 1, 64),
    "recv final <- 2, 1 token": recv(FINAL, 2, 1),
}


@given(OPS)
def test_text_and_back(op: Op) -> None:
    assert parse_op(str(op)) == op


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_each_kind(text: str) -> None:
    assert str(TEXTS[text]) == text
    assert parse_op(text) == TEXTS[text]


def test_spaces_do_not_matter() -> None:
    assert parse_op("  send   kv c0 l5\t-> 2,  128 tokens ") == send(Value("kv", 0, 5), 2, 128)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "layer",
        "layer c0",
        "embed c0 l0",
        "layer c-1 l0",
        "compute c0 l0",
        "send kv c0 l5 <- 2, 1 token",
        "recv kv c0 l5 -> 2, 1 token",
        "send kv c0 l5 -> 2",
        "send final c0 l1 -> 2, 1 token",
        "send block c0 l5 -> 2, 1 token",
        "layer c0 l0 layer c0 l1",
    ],
)
def test_what_is_no_op_says_what_one_looks_like(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_op(text)
    assert has_facts(str(caught.value), f"{text!r} is not an op … 'embed c0' … 'recv final <- 2, 1 token'")


def test_a_layer_needs_its_hidden_state_and_the_blocks_of_earlier_chunks() -> None:
    op = Op("layer", 2, 5)
    assert op.needs() == [Value("hidden", 2, 5), Value("kv", 0, 5), Value("kv", 1, 5)]
    assert op.makes() == (Value("kv", 2, 5), Value("hidden", 2, 6))


def test_embed_and_norm_are_the_ends_of_compute() -> None:
    assert Op("embed", 3).needs() == []
    assert Op("embed", 3).makes() == (Value("hidden", 3, 0),)
    assert Op("norm", 3, 36).needs() == [Value("hidden", 3, 36)]
    assert Op("norm", 3, 36).makes() == (FINAL,)


@given(VALUES)
def test_a_send_needs_what_its_recv_makes(value: Value) -> None:
    assert (send(value, 1, 8).needs(), send(value, 1, 8).makes()) == ([value], ())
    assert (recv(value, 1, 8).needs(), recv(value, 1, 8).makes()) == ([], (value,))
    assert send(value, 1, 8).value == recv(value, 1, 8).value == value


def test_blocks_have_a_communicator_of_their_own() -> None:
    carried = {what: send(Value(what), 0, 1).communicator for what in ("hidden", "kv", "final")}
    assert carried == {"hidden": "hidden", "kv": "kv", "final": "hidden"}


def test_values_are_named_in_the_words_of_the_design() -> None:
    names = [str(v) for v in (Value("kv", 2, 5), Value("hidden", 2, 5), FINAL)]
    assert names == ["block c2 l5", "hidden c2 l5", "final"]


@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_a_lane_waits_for_all_that_its_ops_need_and_for_no_block_twice(
    schedule: Schedule, strategy: SyncStrategy
) -> None:
    plan = build(partition(layers=5, tokens=45, world_size=3, chunk_size=4), schedule, strategy)
    for lane in (lane for lanes in plan.lanes for lane in lanes):
        there, waits = set[Value](), new_needs(lane.ops)
        for op, needs in zip(lane.ops, waits, strict=True):
            there.update(needs)
            assert there.issuperset(op.needs())
            there.update(op.makes())
        assert len(set(sum(waits, ()))) == sum(map(len, waits)), "a value is waited for once"
        if lane.name == "compute":
            assert max(map(len, waits)) <= 1, "what a lane has made itself is there"


def test_a_layer_on_a_lane_of_its_own_waits_for_the_blocks_before() -> None:
    lane = [Op("layer", 2, 1), Op("layer", 4, 1), Op("layer", 3, 1)]
    blocks = [Value("kv", chunk, 1) for chunk in range(4)]
    hidden = [Value("hidden", op.chunk, 1) for op in lane]
    assert new_needs(lane) == [(hidden[0], *blocks[:2]), (hidden[1], blocks[3]), (hidden[2],)]

"""Breakpoints: what they match, their text, and where a run stops."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.plan.breakpoints import Breakpoint, check, next_stop, parse_when, previous_stop
from dinfer.plan.cut import Cuts, is_inside
from dinfer.plan.ops import Op, PlanError, Value, recv
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build

SHAPE = partition(layers=6, tokens=10, world_size=3, chunk_size=4)
CUTS = {
    (schedule, strategy): Cuts(build(SHAPE, schedule, strategy))
    for schedule in ("pipelined", "lockstep")
    for strategy in ("pairwise", "ring")
}
cuts = st.sampled_from(sorted(CUTS)).map(CUTS.__getitem__)
PIPELINED = CUTS["pipelined", "pairwise"]


@pytest.mark.parametrize(
    ("text", "condition", "bound"),
    [
        (None, "", 0.0),
        ("nan", "nan", 0.0),
        ("Inf", "inf", 0.0),
        ("absmax > 100", "absmax", 100.0),
        ("absmax above 1e3", "absmax", 1000.0),
        ("digest differs", "digest", 0.0),
        ("slower than 2.5 ms", "slower", 2.5),
    ],
)
def test_a_condition_is_read(text: str | None, condition: str, bound: float) -> None:
    assert parse_when(text) == (condition, bound)


@pytest.mark.parametrize("text", ["nan", "inf", "absmax > 100", "digest differs", "slower than 2.5 ms"])
def test_a_condition_is_written_as_it_is_read(text: str) -> None:
    assert Breakpoint(1, None, "layer", None, None, *parse_when(text)).when == text


@pytest.mark.parametrize(
    "text",
    ["absmax", "slower than x ms", "when it breaks", "absmax > ", "absmax > 1.2.3", "slower than . ms"],
)
def test_another_condition_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(PlanError, match=r"when is .*; it must be one of 'nan', 'inf', 'absmax > 100'"):
        parse_when(text)


def test_it_matches_its_ops_only() -> None:
    one = Breakpoint(1, rank=1, layer=3)
    assert one.matches(1, Op("layer", 0, 3))
    assert not one.matches(0, Op("layer", 0, 3))
    assert not one.matches(1, Op("layer", 0, 2))
    assert not one.matches(1, recv(Value("kv", 0, 3), 0, 4))


def test_it_reads_as_a_sentence_and_comes_back_from_json() -> None:
    one = Breakpoint(2, 1, "layer", 0, 3, "absmax", 100.0)
    assert str(one) == "#2: after layer 3, chunk 0, on rank 1, when absmax > 100"
    assert Breakpoint(**one.as_dict()) == one
    third = Breakpoint(3, chunk=1, hit=3)
    assert str(third) == "#3: after each layer, chunk 1, only at hit 3"
    assert third.call == "run.break_at(chunk=1, hit=3)"
    assert Breakpoint(**third.as_dict()) == third


def test_one_that_nothing_can_meet_is_refused() -> None:
    check(Breakpoint(1, layer=5), PIPELINED)
    with pytest.raises(PlanError, match=r"^there is no layer 6: the layers are 0 to 5\.$"):
        check(Breakpoint(1, layer=6), PIPELINED)
    with pytest.raises(PlanError, match=r"^there is no chunk -1: the chunks are 0 to 2\.$"):
        check(Breakpoint(1, chunk=-1), PIPELINED)
    with pytest.raises(PlanError, match=r"^there is no rank 3: the ranks are 0 to 2\.$"):
        check(Breakpoint(1, layer=1, rank=3), PIPELINED)
    with pytest.raises(PlanError, match=r"^layer is 'x'; it must be a whole number from 0 to 5\.$"):
        check(Breakpoint(1, layer="x"), PIPELINED)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="layer ops run on the rank that owns the layer"):
        check(Breakpoint(1, rank=0, layer=5), PIPELINED)
    with pytest.raises(PlanError, match="op is 'jump'; it must be one of embed, layer"):
        check(Breakpoint(1, op="jump"), PIPELINED)  # type: ignore[arg-type]


def test_without_breakpoints_a_run_goes_to_the_end() -> None:
    assert next_stop(PIPELINED, PIPELINED.start, []) == (PIPELINED.end, [])
    assert next_stop(PIPELINED, PIPELINED.start, [Breakpoint(1, condition="nan")]) == (PIPELINED.end, [])


@given(cuts, st.integers(0, 5), st.integers(0, 2))
def test_after_a_layer_the_run_stands_as_run_to_would(found: Cuts, index: int, chunk: int) -> None:
    one = Breakpoint(1, layer=index, chunk=chunk)
    assert next_stop(found, found.start, [one]) == (found.after_block(chunk, index), [one])


@given(cuts, st.integers(0, 5), st.sampled_from(("layer", "embed", "norm", "send", "recv")), st.data())
def test_going_on_meets_every_matching_op_and_ends(
    found: Cuts, index: int, kind: str, data: st.DataObject
) -> None:
    """From stop to stop: each is ahead and consistent, and what was never stopped at does not match."""
    rank = data.draw(st.none() | st.integers(0, 2))
    one = Breakpoint(1, rank=rank, op=kind, layer=index if kind in ("layer", "send") else None)  # type: ignore[arg-type]
    cut, stops = found.start, 0
    while cut != found.end:
        left = [(at.rank, op) for at, op in found.plan.places() if at.index >= cut[at.rank][at.lane]]
        ahead = any(one.matches(*rank_and_op) for rank_and_op in left)
        target, met = next_stop(found, cut, [one])
        assert is_inside(cut, target)
        assert target != cut
        assert found.is_consistent(target)
        assert met == ([one] if ahead else [])
        if not ahead:
            assert target == found.end
        cut, stops = target, stops + 1
    assert stops <= 60


@given(cuts, st.integers(1, 9), st.none() | st.integers(0, 2))
def test_a_number_of_a_hit_stops_there_only_and_again_after_going_back(
    found: Cuts, hit: int, chunk: int | None
) -> None:
    every = Breakpoint(1, chunk=chunk)
    matching = found.ops_where(every.matches)
    if hit > len(matching):
        with pytest.raises(PlanError, match=rf"hit is {hit}; {len(matching)} ops of this run match"):
            check(Breakpoint(1, chunk=chunk, hit=hit), found)
        return
    one = Breakpoint(1, chunk=chunk, hit=hit)
    check(one, found)
    stop, met = next_stop(found, found.start, [one])
    assert met == [one]
    _, op = matching[hit - 1]
    assert stop == found.after_block(op.chunk, op.layer)
    assert next_stop(found, stop, [one]) == (found.end, [])
    assert previous_stop(found, found.end, [one], {}) in ((stop, [one]), (found.start, []))
    assert previous_stop(found, found.after_block(op.chunk, op.layer), [one], {})[0] == found.start
    both = [one, Breakpoint(2, layer=op.layer, chunk=op.chunk)]
    assert next_stop(found, found.start, both) == (stop, both)


def test_a_disabled_one_with_a_number_of_a_hit_stops_nothing() -> None:
    one = Breakpoint(1, hit=2, enabled=False)
    assert next_stop(PIPELINED, PIPELINED.start, [one]) == (PIPELINED.end, [])
    assert previous_stop(PIPELINED, PIPELINED.end, [one], {}) == (PIPELINED.start, [])


# -- going back


@given(cuts, st.sets(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=4))
def test_going_back_passes_the_places_of_going_on_in_reverse(
    found: Cuts, blocks: set[tuple[int, int]]
) -> None:
    breakpoints = [Breakpoint(n, chunk=chunk, layer=layer) for n, (layer, chunk) in enumerate(blocks, 1)]
    cut, forward = found.start, []
    while True:
        cut, met = next_stop(found, cut, breakpoints)
        if not met:
            break
        if cut != found.end:  # there is nothing to go back by from there
            forward.append((cut, met))
    assert cut == found.end
    backward = []
    while True:
        cut, met = previous_stop(found, cut, breakpoints, {})
        if not met:
            break
        backward.append((cut, met))
    assert cut == found.start
    assert backward == forward[::-1]


def test_a_condition_counts_where_it_has_been_met() -> None:
    one = Breakpoint(1, layer=2, condition="nan")
    cut = PIPELINED.after_block(2, 3)
    assert previous_stop(PIPELINED, cut, [one], {}) == (PIPELINED.start, [])
    met = {1: {(1, Op("layer", 1, 2))}}
    assert previous_stop(PIPELINED, cut, [one], met) == (PIPELINED.after_block(1, 2), [one])
    early = PIPELINED.after_next(PIPELINED.start, lambda _, op: str(op) == "layer c1 l2")
    assert early is not None
    step = PIPELINED.next(early[0], "op")  # not all ranks have the block yet
    assert previous_stop(PIPELINED, step, [one], met) == (early[0], [one])


def test_going_back_to_a_transfer_ends_just_after_it() -> None:
    one = Breakpoint(1, op="recv", rank=2, chunk=0, layer=1)
    cut, met = previous_stop(PIPELINED, PIPELINED.end, [one], {})
    assert met == [one]
    assert PIPELINED.is_consistent(cut)
    assert next_stop(PIPELINED, PIPELINED.start, [one]) == (cut, [one])
    assert previous_stop(PIPELINED, cut, [one], {}) == (PIPELINED.start, [])

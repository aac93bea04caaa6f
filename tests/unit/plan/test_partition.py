"""Layers into stages, tokens into chunks."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.plan.ops import PlanError
from dinfer.plan.partition import Shape, partition
from dinfer.plan.plan import parse_plan
from dinfer.plan.schedule import build
from tests.support.facts import has_facts
from tests.support.plan_strategies import shapes


def stages(layers: int, world_size: int, *split: int) -> list[tuple[int, int]]:
    shape = partition(layers=layers, tokens=1, world_size=world_size, chunk_size=1, layer_split=split or None)
    return [(stage.start, stage.stop) for stage in shape.stages]


def test_layers_divide_evenly() -> None:
    assert stages(6, 3) == [(0, 2), (2, 4), (4, 6)]


def test_the_first_stages_take_the_layers_left_over() -> None:
    assert stages(8, 3) == [(0, 3), (3, 6), (6, 8)]


def test_a_split_of_ones_own() -> None:
    assert stages(36, 3, 14, 28) == [(0, 14), (14, 28), (28, 36)]


def test_one_rank_owns_all() -> None:
    assert stages(5, 1) == [(0, 5)]
    shape = partition(layers=5, tokens=1, world_size=1, chunk_size=1, layer_split=())
    assert shape.starts == (0,)


@pytest.mark.parametrize(
    ("tokens", "chunk_size", "expected"),
    [
        (6, 2, [2, 2, 2]),
        (5, 2, [2, 2, 1]),
        (1, 128, [1]),
        (127, 128, [127]),
        (128, 128, [128]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_chunks_are_equal_but_for_the_last(tokens: int, chunk_size: int, expected: list[int]) -> None:
    assert [len(chunk) for chunk in Shape(1, tokens, chunk_size, (0,)).chunks] == expected


@given(shapes(ranks=16, layers=40, chunks=9, chunk_size=9))
def test_every_layer_and_token_belongs_to_exactly_one(shape: Shape) -> None:
    assert list(chain.from_iterable(shape.stages)) == list(range(shape.layers))
    assert list(chain.from_iterable(shape.chunks)) == list(range(shape.tokens))
    assert all(index in shape.stages[owner] for index, owner in enumerate(shape.owners))
    assert len(shape.owners) == shape.layers
    assert shape.blocks == shape.layers * len(shape.chunks)


@given(st.integers(1, 100), st.data())
def test_even_stages_differ_by_one_layer_at_most_and_shrink(layers: int, data: st.DataObject) -> None:
    sizes = [stop - start for start, stop in stages(layers, data.draw(st.integers(1, layers)))]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"world_size": 0}, "world_size is 0; it must be at least 1."),
        ({"world_size": 7}, "world_size is 7 … 6 layers … at most 6 ranks"),
        ({"layer_split": (2,)}, "layer_split takes 2 numbers for 3 ranks … got 1"),
        ({"layer_split": (4, 2)}, "[0, 4, 2] of 6 … the first must be 0 … at least one layer"),
        ({"layer_split": (2, 6)}, "[0, 2, 6] of 6 … the first must be 0 … at least one layer"),
        ({"tokens": 0}, "tokens is 0 … at least 1"),
        ({"chunk_size": 0}, "chunk_size is 0 … at least 1"),
        ({"layers": 0, "world_size": 0}, "world_size is 0 … at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int | tuple[int, ...]], facts: str) -> None:
    values: dict[str, object] = {"layers": 6, "tokens": 5, "world_size": 3, "chunk_size": 2, **changes}
    with pytest.raises(PlanError) as caught:
        partition(**values)  # type: ignore[arg-type]
    assert has_facts(str(caught.value), facts), str(caught.value)


@pytest.mark.parametrize("starts", [(), (1,), (0, 0), (-1, 1)])
def test_stages_must_begin_at_layer_0_and_own_something(starts: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="the first must be 0 and every stage must own at least one layer"):
        Shape(3, 1, 1, starts)


def test_a_shape_needs_a_layer() -> None:
    with pytest.raises(PlanError, match="layers is 0; it must be at least 1"):
        Shape(0, 1, 1, (0,))


def test_chunks_may_have_different_lengths() -> None:
    shape = partition(layers=2, tokens=10, world_size=2, chunk_size=4, lengths=(5, 3, 2))
    assert shape.chunks == (range(5), range(5, 8), range(8, 10))
    assert (shape.chunk_size, shape.blocks, shape.chunks_text) == (5, 6, "5+3+2")
    assert [shape.chunk_of(token) for token in (0, 4, 5, 7, 8, 9)] == [0, 0, 1, 1, 2, 2]
    even = partition(layers=2, tokens=10, world_size=2, chunk_size=8, lengths=(4, 4, 2))
    assert even == partition(layers=2, tokens=10, world_size=2, chunk_size=4)
    assert even.chunk_of(9) == 2
    plan = build(shape, "pipelined", "ring")
    assert parse_plan(plan.text()) == plan
    assert plan.id != build(even, "pipelined", "ring").id


@pytest.mark.parametrize(
    ("lengths", "words"),
    [((5, 4), "9 tokens in all, but the prompt has 10"), ((10, 0), "length is 0; it must be at least 1")],
)
def test_chunks_that_are_not_the_prompt_are_refused(lengths: tuple[int, ...], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        partition(layers=2, tokens=10, world_size=2, chunk_size=4, lengths=lengths)


@pytest.mark.parametrize(
    ("tokens", "chunk_size", "text"),
    [(1, 4, "1 token in 1 chunk"), (4, 4, "4 tokens in 1 chunk"), (5, 4, "5 tokens in 2 chunks")],
)
def test_tokens_and_chunks_in_words(tokens: int, chunk_size: int, text: str) -> None:
    assert partition(layers=2, tokens=tokens, world_size=2, chunk_size=chunk_size).tokens_text == text

"""Bins of any map at any size: no mark is lost, no state outranks a more urgent one, and what is sent can be read."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dinfer.run.state import Mark
from dinfer.views.bins import LEAST, PART, URGENT, BinSize, binned, fitting, packed, per_cell
from dinfer.views.cells import ARMED, BASE, DIFFERS, NONFINITE, CellStates, marked
from tests.support.maps import half_done, unpacked

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9))
BYTES = st.sampled_from(
    [state | mark for state in range(5) for mark in (0, DIFFERS, ARMED, NONFINITE, DIFFERS | ARMED)]
)
LARGE = (80, 1000, 8)
MARKED = DIFFERS | ARMED | NONFINITE


@st.composite
def maps(draw: st.DrawFn) -> CellStates:
    return draw(arrays(np.uint8, draw(SIZES), elements=BYTES))


@given(maps(), st.builds(BinSize, st.integers(1, 12), st.integers(1, 50), st.integers(1, 12)))
def test_every_mark_is_in_its_bin_and_no_state_is_more_urgent_than_the_bin_s(
    states: CellStates, size: BinSize
) -> None:
    found = binned(states, size)
    assert found.shape == tuple(-(-count // per) for count, per in zip(states.shape, size, strict=True))
    for at in product(*map(range, found.shape)):
        block = states[tuple(slice(n * per, (n + 1) * per) for n, per in zip(at, size, strict=True))]
        assert found[at] & MARKED == np.bitwise_or.reduce(block, axis=None) & MARKED
        assert found[at] & BASE == max(map(int, np.unique(block & BASE)), key=URGENT.index)


@given(maps())
def test_bins_of_one_block_are_the_map(states: CellStates) -> None:
    assert np.array_equal(binned(states, BinSize()), states)


@given(maps())
def test_what_is_sent_can_be_read(states: CellStates) -> None:
    assert np.array_equal(unpacked(packed(states), states.shape), states)


@given(st.integers(1, 10**6), st.integers(0, 500))
def test_there_is_room_for_all_cells(count: int, room: int) -> None:
    per = per_cell(count, room)
    assert -(-count // per) <= max(1, room)
    assert per == 1 or -(-count // (per - 1)) > max(1, room)  # no coarser than it must be


def test_a_caption_says_what_shares_a_cell() -> None:
    assert BinSize().text == ""
    assert BinSize(chunks=10).text == "each cell is 10 chunks"
    assert BinSize(2, 10, 4).text == "each cell is 10 chunks × 2 layers, each part of a cell is 4 ranks"


def test_a_large_map_is_a_small_message_and_its_one_mark_is_seen_at_any_size() -> None:
    states = marked(half_done(*LARGE), [Mark(5, 109, 3, "differs", "")])
    sent = packed(states)
    assert len(sent) < 20_000
    found = unpacked(sent, LARGE)
    assert np.argwhere(found & DIFFERS).tolist() == [[3, 109, 5]]
    for per in (1, 7, 22, 1000):
        bins = binned(found, BinSize(per, per, 8))
        assert np.argwhere(bins & DIFFERS).tolist() == [[3 // per, 109 // per, 0]]


@given(SIZES, st.integers(100, 2000), st.integers(50, 800))
def test_a_map_fits_and_its_parts_can_be_distinguished(
    shape: tuple[int, int, int], wide: int, high: int
) -> None:
    size = fitting(shape, wide, high)
    layers, chunks, ranks = (-(-count // per) for count, per in zip(shape, size, strict=True))
    assert chunks * ranks * PART <= wide
    assert chunks * LEAST <= wide
    assert layers * LEAST <= high

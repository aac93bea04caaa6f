"""Covering arrays: every pair that can be, in few cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dinfer.lab.cells import cells_of, covering_array, graph_of, possible_cells
from dinfer.lab.faults import RULES, target

CELLS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.booleans()), min_size=1, unique=True
)


def pairs(cells: Iterable[Sequence[object]]) -> set[Any]:
    """Of two factors of a cell, each with its value."""
    return {pair for cell in cells for pair in combinations(enumerate(cell), 2)}


@given(possible=CELLS, seed=st.integers(0, 9))
def test_every_pair_of_what_is_possible_is_covered_and_nothing_else(
    possible: list[tuple[object, ...]], seed: int
) -> None:
    chosen = covering_array(possible, seed)
    assert set(chosen) <= set(possible)
    assert len(set(chosen)) == len(chosen)
    assert pairs(chosen) == pairs(possible)
    assert chosen == covering_array(possible, seed)


def test_it_is_small() -> None:
    """Of 4 × 4 × 4 × 4 × 4 combinations no array can have fewer than 16; greedy ones come near."""
    assert len(covering_array(list(product(range(4), repeat=5)), 0)) <= 30


def test_the_matrix_covers_all_pairs_in_at_most_300_cells_and_is_repeatable() -> None:
    cells = cells_of(0)
    assert len(cells) <= 300
    assert pairs(cells) == pairs(possible_cells())
    assert {cell.fault for cell in cells} == set(RULES)
    assert cells == cells_of(0)
    assert cells != cells_of(1)
    assert all(target(graph_of(cell.strategy, cell.schedule), cell) for cell in cells)


def test_a_sample_is_spread_over_the_faults() -> None:
    assert {cell.fault for cell in cells_of(3, len(RULES))} == set(RULES)
    assert cells_of(3, 6) == cells_of(3, 7)[:6]
    assert len(cells_of(3, 10_000)) == len(cells_of(3))

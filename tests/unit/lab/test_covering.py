"""Covering arrays: every pair that can be, in few cells."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from dinfer.lab.cells import cells_of, covering_array, graph_of, pairs_of, possible_cells, spread
from dinfer.lab.expected import RULES, target

CELLS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.booleans()), min_size=1, unique=True
)


@given(possible=CELLS, seed=st.integers(0, 9))
def test_every_pair_of_what_is_possible_is_covered_and_nothing_else(
    possible: list[tuple[object, ...]], seed: int
) -> None:
    chosen = covering_array(possible, seed)
    assert set(chosen) <= set(possible)
    assert len(set(chosen)) == len(chosen)
    assert {p for cell in chosen for p in pairs_of(cell)} == {p for cell in possible for p in pairs_of(cell)}
    assert chosen == covering_array(possible, seed)


def test_it_is_small() -> None:
    """Of 4 × 4 × 4 × 4 × 4 combinations no array can have fewer than 16; greedy ones come near."""
    assert len(covering_array(list(product(range(4), repeat=5)), 0)) <= 30


def test_the_matrix_covers_all_pairs_in_at_most_300_cells_and_is_repeatable() -> None:
    cells = cells_of(0)
    assert len(cells) <= 300
    assert {p for c in cells for p in pairs_of(c)} == {p for c in possible_cells() for p in pairs_of(c)}
    assert {cell.fault for cell in cells} == set(RULES)
    assert cells == cells_of(0)
    assert cells != cells_of(1)
    assert all(target(graph_of(cell.strategy, cell.schedule), cell) for cell in cells)


def test_a_sample_is_spread_over_the_faults() -> None:
    assert {cell.fault for cell in cells_of(3, len(RULES))} == set(RULES)
    assert cells_of(3, 6) == cells_of(3, 7)[:6]
    assert len(cells_of(3, 10_000)) == len(cells_of(3))
    assert spread([("a", 1), ("a", 2), ("b", 3)], 2) == [("a", 1), ("b", 3)]

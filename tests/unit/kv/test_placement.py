"""Rows that lie where others should are named from their digests alone."""

from __future__ import annotations

import pytest

from dinfer.kv.placement import Misplaced, RowDigests, misplaced

EMPTY = -1
BLOCKS = [range(0, 4), range(4, 8), range(8, 12)]


def row(number: int) -> RowDigests:
    """Digests of three heads, all different."""
    return tuple(10 * number + n for n in range(3)), tuple(1000 + 10 * number + n for n in range(3))


RIGHT = [row(n) for n in range(12)]


def named(mine: list[RowDigests]) -> list[Misplaced]:
    return misplaced(mine, RIGHT, EMPTY, BLOCKS)


def test_right_rows_are_not_named() -> None:
    assert named(list(RIGHT)) == []
    assert named(RIGHT[:8]) == []


def test_a_row_found_nowhere_is_not_named() -> None:
    assert named([*RIGHT[:5], ((7, 7, 7), RIGHT[5][1]), *RIGHT[6:]]) == []


@pytest.mark.parametrize(
    ("mine", "found"),
    [
        (RIGHT + RIGHT, [(12, 24, "repeated", "KV", 0)]),
        ([*RIGHT, RIGHT[11]], [(12, 13, "repeated", "KV", 11)]),
        ([*RIGHT[:8], *RIGHT[4:8], *RIGHT[8:]], [(8, 12, "stale", "KV", 4), (12, 16, "shifted", "KV", 8)]),
        ([*RIGHT[:8], *RIGHT[4:8]], [(8, 12, "stale", "KV", 4)]),
        ([*RIGHT[:8], *RIGHT[5:8], RIGHT[11]], [(8, 11, "repeated", "KV", 5)]),
        ([*RIGHT[:4], RIGHT[6], RIGHT[5], RIGHT[7], RIGHT[4], *RIGHT[8:]], [(4, 8, "permuted", "KV", -1)]),
        ([*RIGHT[:4], *((v, k) for k, v in RIGHT[4:8]), *RIGHT[8:]], [(4, 8, "swapped", "KV", -1)]),
        ([*RIGHT[:4], *((v, v) for _, v in RIGHT[4:8]), *RIGHT[8:]], [(4, 8, "swapped", "K", -1)]),
        ([((k[2], k[0], k[1]), (v[2], v[0], v[1])) for k, v in RIGHT[:4]], [(0, 4, "heads", "KV", 1)]),
        ([(k, (v[1], v[2], v[0])) for k, v in RIGHT[:4]], [(0, 4, "heads", "V", 2)]),
        ([*RIGHT[:4], *[((EMPTY,) * 3, (EMPTY,) * 3)] * 4], [(4, 8, "empty", "KV", -1)]),
        ([*RIGHT[:4], *((k, (EMPTY,) * 3) for k, _ in RIGHT[4:8])], [(4, 8, "empty", "V", -1)]),
        ([*RIGHT[:8], *((k, RIGHT[n][1]) for n, (k, _) in enumerate(RIGHT[8:], 4))], [(8, 12, "stale", "V", 4)]),
        (RIGHT[1:], [(0, 11, "shifted", "KV", 1)]),
        ([*RIGHT, row(99)], [(12, 13, "extra", "KV", -1)]),
    ],
)  # fmt: skip
def test_each_kind_is_named(mine: list[RowDigests], found: list[tuple[object, ...]]) -> None:
    assert [tuple(one) for one in named(mine)] == found


def test_equal_rows_that_have_changed_alike_repeat_nothing() -> None:
    """V of the first layer is the same for equal tokens, before and after a cast."""
    right = [*RIGHT[:5], (RIGHT[5][0], RIGHT[1][1]), *RIGHT[6:]]
    mine = [(k, (7, 7, 7)) if n in (1, 5) else (k, v) for n, (k, v) in enumerate(right)]
    assert misplaced(mine, right, EMPTY, BLOCKS) == []
    elsewhere = [(k, RIGHT[3][1]) if n in (1, 5) else (k, v) for n, (k, v) in enumerate(right)]
    assert [one[:3] for one in misplaced(elsewhere, right, EMPTY, BLOCKS)] == [
        (1, 2, "shifted"),
        (5, 6, "repeated"),
    ]


def test_a_block_of_other_values_is_not_named_by_rows_that_are_a_neighbours_by_chance() -> None:
    """K of equal tokens at shifted positions."""
    mine = [*RIGHT[:4], row(77), RIGHT[6], RIGHT[7], row(88), *RIGHT[8:]]
    assert named(mine) == []
    assert [one[:3] for one in named([*mine[:8], RIGHT[9], RIGHT[8], *mine[10:]])] == [(8, 10, "permuted")]

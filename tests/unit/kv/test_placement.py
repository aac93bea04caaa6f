"""Rows that lie where others should are named from their digests alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinfer.kv.rows import Misplaced, misplaced_in_blocks, misplaced_rows

EMPTY = -1
BLOCKS = [range(0, 4), range(4, 8), range(8, 12)]
RIGHT = 1 + torch.arange(12 * 2 * 3).reshape(12, 2, 3)
"""Digests of K and V of three heads, all different."""

Found = tuple[int, int, str, str, int]


def named(mine: Tensor, right: Tensor = RIGHT) -> list[Misplaced]:
    if len(mine) != len(right):
        return misplaced_rows(mine, right)
    return misplaced_in_blocks(mine, right, BLOCKS, EMPTY)


def changed(places: slice | list[int], part: int | slice, value: Tensor | int) -> Tensor:
    """The right rows with others in some places; `part` 0: K, 1: V, slice(None): both."""
    mine = RIGHT.clone()
    mine[places, part] = value
    return mine


def test_right_rows_are_not_named() -> None:
    assert named(RIGHT) == []


def test_a_row_found_nowhere_is_not_named() -> None:
    assert named(changed([5], 0, 999)) == []


K, V, BOTH = 0, 1, slice(None)


@pytest.mark.parametrize(
    ("mine", "found"),
    [
        (RIGHT.repeat(2, 1, 1), [(12, 24, "repeated", "KV", 0)]),
        (RIGHT[[*range(12), 11]], [(12, 13, "repeated", "KV", 11)]),
        (RIGHT[[*range(8), *range(4, 12)]], [(8, 12, "repeated", "KV", 4), (12, 16, "shifted", "KV", -1)]),
        (RIGHT[[*range(1, 12)]], [(0, 11, "shifted", "KV", -1)]),
        (torch.cat([RIGHT, torch.full((1, 2, 3), 999)]), [(12, 13, "extra", "KV", -1)]),
        (changed(slice(8, 12), BOTH, RIGHT[4:8]), [(8, 12, "stale", "KV", 4)]),
        (changed(slice(8, 12), V, RIGHT[4:8, 1]), [(8, 12, "stale", "V", 4)]),
        (changed(slice(8, 11), BOTH, RIGHT[5:8]), [(8, 11, "repeated", "KV", 5)]),
        (changed(slice(8, 12), BOTH, RIGHT[0:4]), [(8, 12, "repeated", "KV", 0)]),
        (changed([4, 7], BOTH, RIGHT[[7, 4]]), [(4, 8, "permuted", "KV", -1)]),
        (changed(slice(4, 7), BOTH, RIGHT[5:8]), [(4, 7, "shifted", "KV", 5)]),
        (changed(slice(4, 8), BOTH, RIGHT[5:9]), [(4, 8, "shifted", "KV", 5)]),
        (changed(slice(4, 8), BOTH, RIGHT[4:8].flip(1)), [(4, 8, "swapped", "KV", -1)]),
        (changed(slice(4, 8), K, RIGHT[4:8, 1]), [(4, 8, "swapped", "K", -1)]),
        (changed(slice(0, 4), BOTH, RIGHT[0:4].roll(1, 2)), [(0, 4, "heads", "KV", -1)]),
        (changed(slice(0, 4), V, RIGHT[0:4, 1].roll(2, 1)), [(0, 4, "heads", "V", -1)]),
        (changed(slice(4, 8), BOTH, EMPTY), [(4, 8, "empty", "KV", -1)]),
        (changed(slice(4, 8), V, EMPTY), [(4, 8, "empty", "V", -1)]),
    ],
)  # fmt: skip
def test_each_kind_is_named(mine: Tensor, found: list[Found]) -> None:
    assert [tuple(one)[:5] for one in named(mine)] == found
    assert all(one.text for one in named(mine))


def test_equal_rows_that_have_changed_alike_repeat_nothing() -> None:
    """V of the first layer is the same for equal tokens, before and after a cast."""
    right = RIGHT.clone()
    right[5, 1] = right[1, 1]
    mine = right.clone()
    mine[[1, 5], 1] = 999
    assert named(mine, right) == []
    mine[[1, 5], 1] = right[3, 1]
    assert {(one.start, one.kind, one.tensors) for one in named(mine, right)} == {
        (1, "repeated", "V"),
        (5, "repeated", "V"),
    }


def test_a_block_of_other_values_is_not_named_by_rows_that_are_anothers_by_chance() -> None:
    """K of equal tokens at shifted positions."""
    mine = changed([5, 6], BOTH, RIGHT[[6, 7]])
    mine[[4, 7]] = torch.tensor([777, 888])[:, None, None]
    assert named(mine) == []
    mine[[8, 9]] = RIGHT[[9, 8]]
    assert [one[:3] for one in named(mine)] == [(8, 10, "permuted")]


def test_a_row_of_one_head_that_is_another_row_is_a_wrong_value() -> None:
    """A value may be zero for other reasons than that a block never came."""
    one_head = RIGHT.clone()
    one_head[5, 0, 1] = EMPTY
    assert named(one_head) == []

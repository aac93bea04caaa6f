"""What is left of two tensors that are compared."""

from __future__ import annotations

import json
from math import inf, isnan, nan

import pytest
import torch
from msgspec import convert

from dinfer.kv.measure import CellDifference, Spot, measure


def test_equal_tensors_differ_in_nothing() -> None:
    one = torch.randn(3, 2, 4)
    found = measure(one, one.clone())
    assert (found.absolute, found.relative, found.changed, found.first) == (0, 0, 0, None)
    assert found.scale == float(one.abs().max())


def test_the_largest_and_the_first_are_named_with_both_values() -> None:
    one = torch.ones(3, 2, 4)
    other = one.clone()
    other[1, 0, 2], other[2, 1, 3] = 1.25, 4
    found = measure(other, one, row=10)
    assert found.first == Spot((11, 0, 2), 1.25, 1)
    assert found.largest == Spot((12, 1, 3), 4, 1)
    assert (found.absolute, found.relative, found.changed) == (3, 0.75, 2)
    assert convert(json.loads(json.dumps(found)), CellDifference) == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_counts_in_one_dtype(dtype: torch.dtype) -> None:
    found = measure(torch.tensor([0.0, 1.0], dtype=dtype), torch.tensor([-0.0, 1.0], dtype=dtype))
    assert (found.changed, found.absolute) == (1, 0)
    both = torch.tensor([nan, 1.0], dtype=dtype)
    assert measure(both, both.clone()).changed == 0


def test_dtypes_are_compared_by_value() -> None:
    found = measure(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5], dtype=torch.bfloat16))
    assert (found.changed, found.absolute) == (1, 0.5)


def test_what_is_no_number_is_infinitely_far() -> None:
    found = measure(torch.tensor([1.0, nan]), torch.tensor([1.0, 2.0]))
    assert (found.absolute, found.nans, found.largest.at) == (inf, (1, 0), (1,))
    assert isnan(found.largest.mine)


def test_parts_are_put_together() -> None:
    one = measure(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    other = measure(torch.tensor([3.0]), torch.tensor([5.0]), row=2)
    both = one.with_(other)
    assert both == measure(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 5.0]))

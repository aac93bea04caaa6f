"""Digests that a watched process takes: fast on a CPU, the same everywhere, and sensitive to each bit."""

from __future__ import annotations

import pytest
import torch

from dinfer.watch.probe import digests
from dinfer.watch.probe.digests import EXACT, SMALL, last_dim_digests, row_sketches, together, token_digests

MASK = 2**64 - 1

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8]
WIDTHS = [1, 2, 3, 8, 6 * EXACT + 2]


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bytes, seen as numbers of this dtype."""
    data = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return data.view(dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_devices_agree(dtype: torch.dtype, width: int) -> None:
    rows = drawn((5, 3, width), dtype)
    by_integers = digests.digests_by_integers(rows, 1)  # as on other devices
    assert torch.equal(last_dim_digests(rows), by_integers)


def test_the_largest_sums_are_exact() -> None:
    rows = torch.full((1, EXACT), -(2**31), dtype=torch.int32)
    weights = digests._make_weights(EXACT, rows.device).tolist()
    assert all(weight % 2 for weight in weights)
    assert int(last_dim_digests(rows)) & MASK == sum(-(2**31) * weight for weight in weights) & MASK


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_bit_counts(dtype: torch.dtype) -> None:
    row = drawn((1, 12), dtype)
    changed = row.view(torch.uint8).repeat(12 * dtype.itemsize * 8, 1)
    for bit in range(len(changed)):
        changed[bit, bit // 8] ^= 1 << bit % 8
    found = last_dim_digests(changed.view(dtype)).tolist()
    assert len({*found, *last_dim_digests(row).tolist()}) == len(found) + 1


@pytest.mark.parametrize("signs", [slice(None), slice(1, None, 2), slice(1, 4, 2)])
def test_signs_that_change_together_count(signs: slice) -> None:
    rows = torch.randn(1000, 128)  # the top bits of words: what sums modulo 2^64 are least sensitive to
    changed = rows.clone()
    changed[:, signs] *= -1
    assert (last_dim_digests(rows) != last_dim_digests(changed)).all()


def test_places_count() -> None:
    row = torch.randn(128)
    turned = torch.stack([row.roll(places) for places in range(128)])
    assert len(set(last_dim_digests(turned).tolist())) == 128


def test_rows_that_differ_little_differ() -> None:
    rows = torch.zeros(200_000, 4, dtype=torch.int32)
    rows[:, 1] = torch.arange(200_000) % 512
    rows[:, 3] = torch.arange(200_000) // 512
    assert len(set(last_dim_digests(rows).tolist())) == 200_000


@pytest.mark.parametrize("tokens", [2, SMALL // 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_together_are_as_each_alone(dtype: torch.dtype, tokens: int) -> None:
    k = torch.randn(2, 4, tokens, 16).to(dtype)
    v = torch.randn(2, tokens, 4, 16).to(dtype).transpose(1, 2)  # lies otherwise
    before = v.clone()
    found = together([k.transpose(1, 2), v.transpose(1, 2)], 2)
    assert found.shape == (2, tokens, 2)
    assert torch.equal(found[..., 0], token_digests(k))
    assert torch.equal(found[..., 1], token_digests(v.contiguous()))
    assert torch.equal(v, before)


def test_numbers_that_lie_apart_are_read() -> None:
    rows = torch.randn(3, 32).to(torch.bfloat16)
    assert torch.equal(last_dim_digests(rows.T), last_dim_digests(rows.T.contiguous()))


@pytest.mark.parametrize("tokens", [3, SMALL])
def test_the_device_that_a_program_has_by_default_is_not_used(tokens: int) -> None:
    rows = torch.randn(tokens, 4)
    right = together([rows, rows])
    digests._digits.cache_clear()
    digests._shifts.cache_clear()
    torch.set_default_device("meta")
    try:
        assert torch.equal(together([rows, rows]), right)
    finally:
        torch.set_default_device(None)


def test_sketches_are_as_long_under_autocast() -> None:
    rows = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        sketches = row_sketches(rows)
    assert sketches.dtype == torch.float32
    assert torch.equal(sketches, row_sketches(rows))

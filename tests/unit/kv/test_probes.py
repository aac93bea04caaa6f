"""Digests: they see what changes a block, and only that."""

from __future__ import annotations

import pytest
import torch

from dinfer.kv.digests import as_numbers, block_digests, row_digests, statistics
from dinfer.watch.probe.digests import mixed_sum
from dinfer.watch.probe.digests import row_digests as row_digests_by_torch

BLOCK = torch.randn(16, 2, 4, 8, generator=torch.Generator().manual_seed(0))


def flipped(block: torch.Tensor, at: int, bit: int) -> torch.Tensor:
    """A copy with one bit changed."""
    copy = block.clone()
    copy.view(-1).view(torch.int32)[at] ^= 1 << bit
    return copy


def digests(block: torch.Tensor) -> tuple[int, int]:
    """Those of K and of V."""
    return as_numbers(block_digests(row_digests(block)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_bytes_have_equal_digests_whatever_the_strides(dtype: torch.dtype) -> None:
    block = BLOCK.to(dtype)
    assert digests(block) == digests(block.clone())
    assert digests(block[:, :, :2]) == digests(block[:, :, :2].contiguous())
    assert all(0 < number < 1 << 64 for number in digests(block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 8), (5, 2, 3, 6), (3, 2, 1, 7), (130, 2, 8, 128)]
)  # the last: two tiles
def test_a_cpu_takes_the_digests_that_every_device_takes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    block = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    rows = row_digests(block)
    assert torch.equal(rows, row_digests_by_torch(block))
    assert torch.equal(block_digests(rows), mixed_sum(rows, first=0))


def test_every_single_flipped_bit_is_seen_in_its_row_alone() -> None:
    rows = row_digests(BLOCK)
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        at = int(torch.randint(BLOCK.numel(), (1,), generator=generator))
        bit = int(torch.randint(31, (1,), generator=generator))
        differing = (row_digests(flipped(BLOCK, at, bit)) != rows).view(-1)
        assert differing.nonzero().tolist() == [[at // BLOCK.shape[-1]]]


def test_two_flipped_signs_do_not_cancel() -> None:
    both = flipped(flipped(BLOCK, 1, 31), 3, 31)
    assert digests(both)[0] != digests(BLOCK)[0]


def test_order_is_seen_tokens_heads_and_k_for_v() -> None:
    whole = digests(BLOCK)
    assert digests(BLOCK.flip(0)) != whole
    assert digests(BLOCK.flip(2)) != whole
    assert digests(BLOCK.flip(3)) != whole
    assert digests(BLOCK.flip(1)) == (whole[1], whole[0])


def test_equal_rows_have_equal_digests_wherever_they_lie() -> None:
    assert torch.equal(row_digests(BLOCK.flip(0)), row_digests(BLOCK).flip(0))
    assert torch.equal(row_digests(BLOCK.flip(1)), row_digests(BLOCK).flip(1))


def test_the_sign_of_zero_is_seen() -> None:
    zero = torch.zeros(1, 2, 1, 8)
    assert digests(zero) != digests(-zero)


def test_statistics_count_what_is_no_number() -> None:
    tensor = torch.tensor([1.0, -2.0, float("nan"), float("inf")])
    assert statistics(tensor).endswith("2 NaN or Inf")
    assert statistics(torch.tensor([1.0, 3.0])) == "[2] 1 … 3, mean 2"

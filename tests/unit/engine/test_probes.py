"""Digests: they see what changes a block, and only that."""

from __future__ import annotations

import pytest
import torch

from dinfer.engine.probes import digest, digests, statistics

BLOCK = torch.randn(16, 2, 4, 8, generator=torch.Generator().manual_seed(0))


def flipped(block: torch.Tensor, at: int, bit: int) -> torch.Tensor:
    """A copy with one bit changed."""
    copy = block.clone()
    copy.view(-1).view(torch.int32)[at] ^= 1 << bit
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_bytes_have_equal_digests_whatever_the_strides(dtype: torch.dtype) -> None:
    block = BLOCK.to(dtype)
    assert digest(block) == digest(block.clone())
    assert digest(block[:, 0]) == digest(block[:, 0].contiguous())
    assert 0 < digest(block) < 1 << 64


def test_every_single_flipped_bit_is_seen() -> None:
    whole = digest(BLOCK)
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        at = int(torch.randint(BLOCK.numel(), (1,), generator=generator))
        bit = int(torch.randint(31, (1,), generator=generator))
        assert digest(flipped(BLOCK, at, bit)) != whole


def test_order_is_seen_tokens_heads_and_k_for_v() -> None:
    whole = digest(BLOCK)
    assert digest(BLOCK.flip(0)) != whole
    assert digest(BLOCK.flip(2)) != whole
    assert digests(BLOCK) != digests(BLOCK.flip(1))
    assert digests(BLOCK) == tuple(reversed(digests(BLOCK.flip(1))))


def test_the_sign_of_zero_is_seen() -> None:
    zero = torch.zeros(8)
    assert digest(zero) != digest(-zero)


def test_statistics_count_what_is_no_number() -> None:
    tensor = torch.tensor([1.0, -2.0, float("nan"), float("inf")])
    assert statistics(tensor).endswith("2 NaN or Inf")
    assert statistics(torch.tensor([1.0, 3.0])) == "[2] 1 … 3, mean 2"

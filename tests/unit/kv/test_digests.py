"""What digests see and what they cannot: every dtype, every width of row, changes that might cancel."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from dinfer.kv.digests import as_numbers, block_digests, row_digests

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.float8_e4m3fn,
]  # fmt: skip
TOKENS, HEADS = 5, 3
MASK = (1 << 64) - 1


def block(dtype: torch.dtype, head_dim: int, seed: int = 0) -> Tensor:
    """A block of random bytes, [tokens, 2, kv_heads, head_dim]."""
    shape = (TOKENS, 2, HEADS, head_dim * dtype.itemsize)
    drawn = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return drawn.view(dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def digests(tensor: Tensor) -> tuple[int, int]:
    """Those of K and of V."""
    return as_numbers(block_digests(row_digests(tensor)))


def by_hand(row: bytes) -> int:
    """A row's digest by its definition, in plain numbers."""
    size = next(size for size in (8, 4, 2, 1) if len(row) % size == 0)
    words = struct.unpack(f"<{len(row) // size}{ {8: 'q', 4: 'i', 2: 'h', 1: 'b'}[size] }", row)
    total = 0
    for place, word in enumerate(words, 1):
        mixed = (word + place * 0x9E3779B97F4A7C15) & MASK
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK
        total += mixed ^ mixed >> 31
    return total & MASK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 2, 3, 5, 7, 8, 12, 128])
def test_a_digest_is_splitmix_summed_over_the_rows_words(dtype: torch.dtype, head_dim: int) -> None:
    tensor = block(dtype, head_dim)
    found = row_digests(tensor)
    assert found.shape == (TOKENS, 2, HEADS)
    assert found.dtype == torch.int64
    rows = as_bytes(tensor).reshape(-1, head_dim * dtype.itemsize)
    assert [int(one) & MASK for one in found.view(-1)] == [by_hand(row.numpy().tobytes()) for row in rows]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [3, 16])
def test_every_byte_counts(dtype: torch.dtype, head_dim: int) -> None:
    tensor = block(dtype, head_dim)
    before, whole = row_digests(tensor), digests(tensor)
    flat = as_bytes(tensor).view(-1)
    width = head_dim * dtype.itemsize
    for at in range(flat.numel()):
        flat[at] ^= 1 << at % 8
        differs = (row_digests(tensor) != before).view(-1)
        assert differs.nonzero().tolist() == [[at // width]]
        assert digests(tensor) != whole
        flat[at] ^= 1 << at % 8
    assert digests(tensor) == whole


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_pairs_of_changes_never_cancel(dtype: torch.dtype) -> None:
    """Two bytes each, in one row or in two, by any value, the same one too: as sums of words would let them."""
    generator = torch.Generator().manual_seed(7)
    tensor = block(dtype, 16)
    flat, whole = as_bytes(tensor).view(-1), digests(tensor)
    width = 16 * dtype.itemsize
    for number in range(400):
        span = width if number % 2 else flat.numel()
        one, other = torch.randperm(span, generator=generator)[:2].tolist()
        by = int(torch.randint(1, 256, (1,), generator=generator))
        changed = by if number % 4 < 2 else 0x80
        flat[one] ^= changed
        flat[other] ^= changed
        assert digests(tensor) != whole, (one, other, changed)
        flat[one] ^= changed
        flat[other] ^= changed


def test_signs_that_flip_everywhere_are_seen() -> None:
    """Top bits are what a sum of products would lose."""
    tensor = torch.randn(TOKENS, 2, HEADS, 8, generator=torch.Generator().manual_seed(1))
    for at in range(0, 8, 2):
        changed = tensor.clone()
        changed[..., at : at + 2] *= -1
        assert (row_digests(changed) != row_digests(tensor)).all()


def test_no_two_of_many_rows_agree() -> None:
    """200,000 rows that differ in a bit or two: by the odds, all digests differ."""
    rows = torch.zeros(100_000, 2, 1, 4, dtype=torch.float32)
    numbers = torch.arange(200_000, dtype=torch.int32).view(100_000, 2, 1)
    rows.view(torch.int32)[..., 0] = numbers
    rows.view(torch.int32)[..., 3] = numbers * 7
    assert len(set(row_digests(rows).view(-1).tolist())) == 200_000


@pytest.mark.parametrize(
    "swap",
    [
        pytest.param(lambda b: b[[1, 0, *range(2, TOKENS)]], id="tokens"),
        pytest.param(lambda b: b.roll(1, 0), id="shifted tokens"),
        pytest.param(lambda b: b[:, :, [1, 0, 2]], id="heads"),
        pytest.param(lambda b: b.flip(1), id="K for V"),
        pytest.param(lambda b: b.roll(1, 3), id="dims"),
    ],
)
def test_what_has_changed_places_is_seen(swap: object) -> None:
    tensor = block(torch.bfloat16, 16)
    assert callable(swap)
    changed = swap(tensor).contiguous()
    assert digests(changed)[0] != digests(tensor)[0]
    assert digests(changed)[1] != digests(tensor)[1]


def test_k_for_v_is_told_by_the_digests_exchanged() -> None:
    tensor = block(torch.float32, 8)
    assert digests(tensor.flip(1)) == digests(tensor)[::-1]


def test_bits_are_seen_where_values_are_equal() -> None:
    """The sign of zero, and what a NaN carries."""
    zero = torch.zeros(1, 2, 1, 8)
    assert torch.equal(zero, -zero)
    assert digests(zero) != digests(-zero)
    quiet, other = (torch.full((1, 2, 1, 8), bits, dtype=torch.int32) for bits in (0x7FC00000, 0x7FC00001))
    assert quiet.view(torch.float32).isnan().all()
    assert other.view(torch.float32).isnan().all()
    assert digests(quiet.view(torch.float32)) != digests(other.view(torch.float32))


def test_what_digests_cannot_see() -> None:
    """Equal rows in each other's places; and dtype and shape, for which a header has fields of its own."""
    same = block(torch.float32, 8)[:1].expand(TOKENS, 2, HEADS, 8).contiguous()
    assert digests(same.flip(0)) == digests(same)
    tensor = block(torch.float32, 8)
    assert torch.equal(row_digests(tensor.view(torch.bfloat16)), row_digests(tensor))


def test_strides_do_not_count() -> None:
    tensor = block(torch.float16, 8)
    assert torch.equal(row_digests(tensor[:, :, ::2]), row_digests(tensor)[:, :, ::2])

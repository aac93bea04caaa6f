"""The KV cache: contiguous blocks, windows with the visible tokens, digests."""

import pytest
import torch

from dinfer.errors import ModelError
from dinfer.model.cache import CacheWindow, KVCache


def filled(dtype: torch.dtype = torch.float32, capacity: int = 8) -> KVCache:
    """Return a cache of 3 layers whose first 8 rows are random, the same at every call."""
    cache = KVCache(3, capacity, 2, 4, dtype, "cpu")
    generator = torch.Generator().manual_seed(0)
    for layer in range(3):
        cache.block(layer, 0, 8).copy_(torch.randn(8, 2, 2, 4, generator=generator))
    return cache


def test_shapes_and_sizes() -> None:
    cache = KVCache(3, 8, 2, 4, torch.bfloat16, "cpu")
    assert (cache.layers, cache.capacity, cache.dtype) == (3, 8, torch.bfloat16)
    assert cache.tensor(2).shape == (8, 2, 2, 4)
    assert cache.tensor(2).nbytes == 8 * 2 * 2 * 4 * 2
    assert cache.k(0, 5).shape == cache.v(0, 5).shape == (1, 2, 5, 4)


def test_a_block_is_a_contiguous_view() -> None:
    cache = filled()
    block = cache.block(1, 2, 5)
    assert block.is_contiguous()
    assert block.shape == (3, 2, 2, 4)
    block.zero_()
    assert not cache.tensor(1)[2:5].any()


def test_k_and_v_are_views_of_the_block() -> None:
    cache = filled()
    assert torch.equal(cache.k(1, 6)[0, 1, 4], cache.block(1, 4, 5)[0, 0, 1])
    assert torch.equal(cache.v(1, 6)[0, 1, 4], cache.block(1, 4, 5)[0, 1, 1])
    assert cache.k(1, 6).data_ptr() == cache.tensor(1).data_ptr()
    assert torch.equal(cache.v(1, 6, start=2), cache.v(1, 6)[:, :, 2:])


@pytest.mark.parametrize("rows", [(-1, 2), (3, 2), (0, 9)])
def test_rows_out_of_the_cache_are_refused(rows: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match="are out of range: this KV cache holds 8"):
        filled().block(0, *rows)


def test_layers_out_of_the_cache_and_empty_caches_are_refused() -> None:
    with pytest.raises(ModelError, match="layer 3 is out of range: this KV cache has layers 0 to 2"):
        filled().tensor(3)
    with pytest.raises(ModelError, match=r"capacity=0, .* must be at least 1"):
        KVCache(3, 0, 2, 4, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sha256_is_equal_for_equal_rows_whatever_lies_behind(dtype: torch.dtype) -> None:
    first, second = filled(dtype), filled(dtype, capacity=20)
    second.block(1, 8, 20).fill_(float("nan"))
    assert first.sha256(8) == second.sha256(8)
    assert len(first.sha256(8)) == 64
    assert first.sha256(8) != first.sha256(7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", [(0, 0, 0, 0, 0), (1, 4, 1, 0, 3), (2, 7, 1, 1, 3)])
def test_sha256_changes_with_one_bit(dtype: torch.dtype, where: tuple[int, int, int, int, int]) -> None:
    cache = filled(dtype)
    before, (layer, *index) = cache.sha256(8), where
    bits = cache.tensor(layer).view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[tuple(index)] ^= 1
    assert cache.sha256(8) != before
    bits[tuple(index)] ^= 1
    assert cache.sha256(8) == before


def test_sha256_tells_minus_zero_from_zero_and_rows_from_each_other() -> None:
    zero, minus, swapped = (KVCache(1, 2, 1, 1, torch.float32, "cpu") for _ in range(3))
    minus.tensor(0)[0, 0, 0, 0] = -0.0
    assert zero.sha256(2) != minus.sha256(2)
    swapped.tensor(0)[1, 0, 0, 0] = -0.0
    assert minus.sha256(2) != swapped.sha256(2)


def test_a_window_writes_in_place_and_shows_what_is_before() -> None:
    cache = filled()
    before = cache.tensor(1).clone()
    keys, values = torch.ones(1, 2, 3, 4), torch.full((1, 2, 3, 4), 2.0)
    seen_k, seen_v = CacheWindow(cache, 2, 3).update(keys, values, 1)
    assert seen_k.shape == seen_v.shape == (1, 2, 5, 4)
    assert torch.equal(seen_k[:, :, 2:], keys)
    assert torch.equal(seen_v[:, :, 2:], values)
    assert torch.equal(cache.tensor(1)[:2], before[:2])
    assert torch.equal(cache.tensor(1)[5:], before[5:])
    assert seen_k.data_ptr() == cache.tensor(1).data_ptr()


def test_a_window_counts_by_position_and_not_by_what_is_filled() -> None:
    window = CacheWindow(filled(), 2, 3)
    assert window.get_seq_length() == window.get_seq_length(2) == window.get_query_offset(1) == 2
    assert window.get_mask_sizes(3, 0) == (5, 0)


@pytest.mark.parametrize(("position", "start"), [(0, 0), (2, 0), (3, 0), (4, 1), (6, 3)])
def test_a_sliding_window_shows_the_last_of_it_and_the_new(position: int, start: int) -> None:
    cache = filled()
    window = CacheWindow(cache, position, 2, sliding_window=4)
    assert window.get_mask_sizes(2, 0) == (position + 2 - start, start)
    keys, values = window.update(torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4), 0)
    assert torch.equal(keys, cache.k(0, position + 2)[:, :, start:])
    assert values.shape == keys.shape


def test_a_window_refuses_other_shapes_and_rows_beyond() -> None:
    with pytest.raises(ModelError, match=r"made K \(1, 2, 2, 4\) .* this cache takes \(1, 2, 3, 4\)"):
        CacheWindow(filled(), 0, 3).update(torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4), 0)
    with pytest.raises(ModelError, match="tokens 7 to 9"):
        CacheWindow(filled(), 7, 2)

"""Probes: a tensor as a few numbers, computed where it lives, without waiting for its device.

A row is what one token and one head of K, or of V, hold: `head_dim` values. Its digest depends on every bit of it and
on their order, and on nothing else: equal rows have equal digests wherever they lie, so swapped, shifted and repeated
rows can be told as that. A block's digests, of K and of V, depend on every row and on where in the block it lies.

Odds: rows that differ within one 64-bit word never agree. Others agree with a probability of about 2^-64, so a
comparison of all rows of 32,768 tokens of Qwen3-4B (19 million) misses a change once in 10^12 times. It is no defence
against somebody who chooses bytes so that they agree.

What a digest sees though values are equal: the sign of zero, the payload of a NaN. What it cannot see: bytes that were
wrong already when it was taken (a wrong computation, which only a reference tells); which rows of a block changed,
where only the block's digests are known; equal rows in each other's places, which is no change; a change that was
undone before anybody looked; dtype and shape, which a header says beside it.
"""

import torch
from torch import Tensor

from dinfer.engine.mixing import mixed_sum

_MASK = (1 << 64) - 1
_INTEGERS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.int8))


def row_digests(block: Tensor) -> Tensor:
    """Of a block [tokens, 2, kv_heads, head_dim]: the digest of each row, int64 [tokens, 2, kv_heads].

    The same on every device. A row is read as 64-bit words, or as the largest that it divides into: see mixing.
    """
    return mixed_sum(_words(block))


def block_digests(rows: Tensor) -> Tensor:
    """From a block's row digests [tokens, 2, kv_heads]: those of K and of V, int64 [2]."""
    return mixed_sum(rows, first=0)


def as_numbers(digests: Tensor) -> tuple[int, int]:
    """A block's digests on the host, as numbers without a sign. Waits for the device."""
    k, v = digests.tolist()
    return k & _MASK, v & _MASK


def _words(block: Tensor) -> Tensor:
    """The rows' bytes as the largest integers that they divide into: int64 [tokens, 2, kv_heads, words]."""
    width = block.shape[-1] * block.element_size()
    dtype = next(dtype for size, dtype in _INTEGERS if width % size == 0)
    return block.contiguous().view(dtype).to(torch.int64)


def statistics(tensor: Tensor) -> str:
    """Shape, range, mean and what is no number, in a line: for people."""
    values = tensor.detach().float()
    broken = int((~torch.isfinite(values)).sum())
    low, high, mean = float(values.min()), float(values.max()), float(values.mean())
    text = f"{list(tensor.shape)} {low:.4g} … {high:.4g}, mean {mean:.4g}"
    return f"{text}, {broken} NaN or Inf" if broken else text

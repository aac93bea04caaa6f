"""Digests of rows and blocks of KV: 64 bits each, the same on every device, sensitive to order.

How words are mixed stands in `watch.probe.digests`, since watched processes take digests too, without dinfer.

A row is what one token and one head of K, or of V, hold: `head_dim` values. Its digest depends on every bit of it and
on their order, and on nothing else, so equal rows have equal digests wherever they lie: swapped, shifted and repeated
rows can be recognised. A block's digests, of K and of V, depend on every row and on its place in the block.

Odds: rows that differ within one 64-bit word never agree. Others agree with a probability of about 2^-64: a comparison
of all rows of 32,768 tokens of Qwen3-4B (19 million) misses a change once in 10^12 times. It is no defence against
somebody who chooses bytes so that they agree.

A digest also sees the sign of zero and the payload of a NaN. It cannot see bytes that were wrong already when it was
taken (only a reference can), which rows of a block changed where only the block's digests are known, a change that was
undone before anybody looked, or dtype and shape, which a header carries beside it.
"""

import torch
from torch import Tensor

from dinfer.watch.probe.digests import INTEGERS, mixed_sum, row_digests

__all__ = ["INTEGERS", "as_numbers", "block_digests", "mixed_sum", "row_digests", "statistics"]

_MASK = (1 << 64) - 1


def block_digests(rows: Tensor) -> Tensor:
    """The digests of K and of V of a block, int64 [2], from those of its rows, [tokens, 2, kv_heads]."""
    return mixed_sum(rows, first=0)


def as_numbers(digests: Tensor) -> tuple[int, int]:
    """A block's digests as unsigned numbers on the host. Waits for the device."""
    k, v = digests.tolist()
    return k & _MASK, v & _MASK


def statistics(tensor: Tensor) -> str:
    """Shape, range, mean and the number of NaN and Inf, in one line."""
    values = tensor.detach().float()
    broken = int((~torch.isfinite(values)).sum())
    low, high, mean = float(values.min()), float(values.max()), float(values.mean())
    text = f"{list(tensor.shape)} {low:.4g} … {high:.4g}, mean {mean:.4g}"
    return f"{text}, {broken} NaN or Inf" if broken else text

"""Probes: a tensor as a few numbers, computed where it lives."""

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_STEP = -7046029254386353131  # 2^64 / golden ratio, as a signed number: odd, so no multiple of it repeats
_MASK = (1 << 64) - 1


def digest(tensor: Tensor) -> int:
    """64 bits that depend on every bit of the tensor and on the order of its values; 0 is never returned.

    A sum of the values' bits, each times an odd number of its own (a multilinear hash, modulo 2^64): two tensors
    that differ by chance agree with a probability of at most 2^-48 for 2-byte values. It is no defence against
    somebody who wants them to agree.
    """
    bits = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()]).to(torch.int64)
    weights = torch.arange(1, bits.numel() + 1, device=bits.device, dtype=torch.int64) * _STEP
    mixed = (bits ^ (bits >> 7)) * (weights | 1)
    return (int(mixed.sum()) & _MASK) or 1


def digests(block: Tensor) -> tuple[int, int]:
    """Those of K and of V of a block, [tokens, 2, kv_heads, head_dim]."""
    return digest(block[:, 0]), digest(block[:, 1])


def statistics(tensor: Tensor) -> str:
    """Shape, range, mean and what is no number, in a line: for people."""
    values = tensor.detach().float()
    broken = int((~torch.isfinite(values)).sum())
    low, high, mean = float(values.min()), float(values.max()), float(values.mean())
    text = f"{list(tensor.shape)} {low:.4g} … {high:.4g}, mean {mean:.4g}"
    return f"{text}, {broken} NaN or Inf" if broken else text

"""The lossy codecs with scales: fp8 and int8 with one for each token and head, int4 with one for each GROUP values.

A scale is the largest absolute value over the largest number that the codec has, in bfloat16, which is exact enough:
values are divided by the scale that travels. NaN or Inf anywhere makes the scale NaN, and so all values that share it:
what is not a number must not arrive as one.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from dinfer.codec.choice import GROUP, SCALE_BYTES, CodecError

LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
"""the largest number of each codec"""

FP8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""the number of each byte of fp8: to look them up is faster than to convert them"""


def encode(name: str, values: Tensor) -> Tensor:
    """K or V, [tokens, kv_heads, head_dim], on the host: uint8, the scales and then the numbers."""
    rows = _grouped(name, values.float())
    largest = rows.abs().amax(-1, keepdim=True)
    scale = torch.where(largest.isfinite(), largest / LARGEST[name], torch.nan).to(torch.bfloat16)
    ratio = rows / scale.float()
    numbers = ratio.nan_to_num(0.0).clamp_(-LARGEST[name], LARGEST[name])
    if name == "fp8":
        coded = numbers.to(torch.float8_e4m3fn).view(torch.uint8).reshape(-1)
    else:
        whole = numbers.round_()
        coded = (
            whole.to(torch.int8).view(torch.uint8).reshape(-1) if name == "int8" else _nibbles(whole, values)
        )
    return torch.cat([scale.reshape(-1).view(torch.uint8), coded])


def decode(name: str, data: Tensor, size: tuple[int, int, int]) -> Tensor:
    """The inverse of `encode` for K or V of that size: float32. Raises CodecError for another number of bytes."""
    tokens, heads, dim = size
    groups = -(-dim // GROUP) if name == "int4" else 1
    scales, values = tokens * heads * groups, tokens * heads * dim
    expected = SCALE_BYTES * scales + ((values + 1) // 2 if name == "int4" else values)
    if data.numel() != expected:
        raise CodecError(f"{data.numel()} bytes are not {list(size)} in {name}, which has {expected}.")
    # copies: a view of another dtype has to begin at a multiple of its size
    scale = (
        data[: SCALE_BYTES * scales].clone().view(torch.bfloat16).float().reshape(tokens, heads, groups, 1)
    )
    coded = data[SCALE_BYTES * scales :]
    if name == "int4":
        pairs = torch.stack([coded & 15, coded >> 4], dim=-1).reshape(-1)[:values]
        numbers = pairs.float().sub_(8.0)
    else:
        numbers = coded.view(torch.int8).float() if name == "int8" else FP8.index_select(0, coded.int())
    rows = _grouped(name, numbers.reshape(size))
    return (rows * scale).reshape(tokens, heads, -1)[..., :dim]


def _grouped(name: str, values: Tensor) -> Tensor:
    """[tokens, kv_heads, groups, values of a group]; the last group of int4 is filled up with zeros."""
    if name != "int4":
        return values.unsqueeze(2)
    filled = pad(values, (0, -values.shape[-1] % GROUP))
    return filled.reshape(*filled.shape[:-1], -1, GROUP)


def _nibbles(whole: Tensor, like: Tensor) -> Tensor:
    """Whole numbers from −7 to 7, two to a byte, without what the groups were filled up with."""
    numbers = whole.flatten(2)[..., : like.shape[-1]].add(8.0).to(torch.uint8).reshape(-1)
    pairs = pad(numbers, (0, numbers.numel() % 2)).reshape(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4

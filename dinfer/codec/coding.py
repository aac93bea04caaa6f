"""Encodes and decodes a block: pure functions of its values. On the host, whatever the block's device is."""

import torch
from torch import Tensor

from dinfer.codec import lossless, scaled
from dinfer.codec.choice import LENGTH_BYTES, BlockSize, Codec, CodecError


def encode(codec: Codec, block: Tensor) -> Tensor:
    """A block [tokens, 2, kv_heads, head_dim] as bytes on the host, uint8 [n]; at most `codec.largest` of its size.
    Waits for the block's device."""
    host = block.detach().cpu()
    if codec.is_none:
        return host.reshape(-1).view(torch.uint8)
    parts = [_encoded(name, host[:, n].contiguous()) for n, name in enumerate(codec)]
    length = torch.tensor([parts[0].numel()], dtype=torch.int32).view(torch.uint8)
    return torch.cat([length, *parts])


def decode(codec: Codec, data: Tensor, out: Tensor) -> None:
    """Writes the block that `encode` was given, as exactly as the codec is, into `out`, [tokens, 2, kv_heads,
    head_dim], on any device. Raises CodecError for bytes that no block of this size encodes to."""
    if codec.is_none:
        out.copy_(data.view(out.dtype).view(out.shape))
        return
    if data.numel() < LENGTH_BYTES:
        raise CodecError(f"{data.numel()} bytes are no block.")
    k = int(data[:LENGTH_BYTES].clone().view(torch.int32))
    if not 0 <= k <= data.numel() - LENGTH_BYTES:
        raise CodecError(f"K has {k} bytes by the first four, and {data.numel() - LENGTH_BYTES} follow.")
    parts = data[LENGTH_BYTES : LENGTH_BYTES + k], data[LENGTH_BYTES + k :]
    host = out if out.device.type == "cpu" else torch.empty_like(out, device="cpu")
    for n, (name, part) in enumerate(zip(codec, parts, strict=True)):
        _decode(name, part, host[:, n])
    if host is not out:
        out.copy_(host)


def as_received(codec: Codec, block: Tensor) -> Tensor:
    """What the codec makes of a block: decode(encode(block)), on its device."""
    found = torch.empty_like(block)
    decode(codec, encode(codec, block), found)
    return found


def size_of(block: Tensor) -> BlockSize:
    """The size of a block [tokens, 2, kv_heads, head_dim]."""
    tokens, _, kv_heads, head_dim = block.shape
    return BlockSize(tokens, kv_heads, head_dim, str(block.dtype).removeprefix("torch."))


def _encoded(name: str, values: Tensor) -> Tensor:
    match name:
        case "none":
            return values.view(-1).view(torch.uint8)
        case "bf16":
            return values.to(torch.bfloat16).view(-1).view(torch.uint8)
        case "lossless":
            return torch.from_numpy(lossless.encode(values.view(-1).view(torch.uint8).numpy()))
        case _:
            return scaled.encode(name, values)


def _decode(name: str, data: Tensor, out: Tensor) -> None:
    """Into K or V, [tokens, kv_heads, head_dim], which need not be contiguous."""
    if name in scaled.LARGEST:
        most = torch.finfo(out.dtype).max  # a scale that was rounded up must not make Inf of a number
        out.copy_(scaled.decode(name, data, (out.shape[0], out.shape[1], out.shape[2])).clamp_(-most, most))
        return
    if name == "lossless":
        data = torch.from_numpy(lossless.decode(data.numpy(), out.numel()))
    dtype = torch.bfloat16 if name == "bf16" else out.dtype
    if data.numel() != out.numel() * dtype.itemsize:
        raise CodecError(f"{data.numel()} bytes are not {list(out.shape)} in {name} of {dtype}.")
    out.copy_(data.clone().view(dtype).view(out.shape))

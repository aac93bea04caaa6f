"""The attention of graphs: one operator that stores K and V of a run of tokens and attends to all rows so far.

transformers' layers call it as their attention function. It takes no mask and no view of the cache: the layer's row of
the table, on the device, says where the tokens lie. So a captured layer serves every position and every cache.

On a CPU the same is done by torch's own operations, for tests of everything above it.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from dinfer.model.kernels.table import COLUMNS
from dinfer.watch.probe.digests import mixed_sum, row_digests

NAME = "dinfer"
"""of the attention function, in `config._attn_implementation`"""

_WORD = 8


def register() -> None:
    """Make the attention function known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)


def _attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_other: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `attention_mask` is the layer's row of the table."""
    return attend(query, key, value, attention_mask, scaling, sliding_window or 0, softcap or 0.0), None


class NewRows:
    """The `past_key_values` of a layer: K and V of the new tokens are handed on to `attend`, which stores them."""

    is_compileable = True

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values


@torch.library.custom_op(f"{NAME}::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, row: Tensor, scale: float, window: int, cap: float) -> Tensor:
    """Store `k` and `v` [1, kv_heads, T, head_dim] in the cache, and attend with `q` [1, heads, T, head_dim].

    `row` is that of the layer in a LayerTable. `window`: how many of the last keys a query sees, 0 for all; `cap`: of
    scores, 0 for none. Returns [1, T, heads, head_dim]. The cache is no argument, so torch does not know that it
    changes: what reads it must run behind this operator on the same stream.
    """
    return (
        _on_device(q, k, v, row, scale, window, cap)
        if q.is_cuda
        else _on_cpu(q, k, v, row, scale, window, cap)
    )


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, row: Tensor, scale: float, window: int, cap: float) -> Tensor:  # noqa: ARG001
    return q.new_empty((1, q.shape[2], q.shape[1], q.shape[3]))


def keep(hidden: Tensor, out: Tensor, row: Tensor) -> None:
    """Copy a layer's output [1, T, hidden_size] to `out`, contiguous, and keep each token's largest value."""
    if not hidden.is_cuda:
        position, *_, largest, tokens = row.tolist()
        out.copy_(hidden)
        if largest:
            to = _memory(largest, (position + tokens, 3), torch.float32)[position:, 2]
            to.copy_(torch.linalg.vector_norm(hidden[0, :tokens], float("inf"), dim=-1, dtype=torch.float32))
        return
    from dinfer.model.kernels import device_code

    words = hidden.contiguous().view(torch.int64)
    width = min(2048, _power_of_2(words.shape[2]))
    device_code.keep[(hidden.shape[1],)](
        words, out.view(torch.int64), row, words.shape[2], width, 8 * hidden.itemsize, triton_dtype(hidden)
    )


def fits(head_dim: int, hidden_size: int, dtype: torch.dtype) -> str:
    """Why the kernels cannot hold a model, or "" if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there are no kernels for {dtype}"
    if head_dim * dtype.itemsize % _WORD or hidden_size * dtype.itemsize % _WORD:
        return f"a row of {head_dim} or {hidden_size} numbers in {dtype} is no multiple of {_WORD} bytes"
    return "" if head_dim <= 256 else f"heads of {head_dim} numbers are larger than 256"


def _on_device(q: Tensor, k: Tensor, v: Tensor, row: Tensor, scale: float, window: int, cap: float) -> Tensor:
    from dinfer.model.kernels import device_code

    _, heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    q, k, v = (one if one.stride(-1) == 1 else one.contiguous() for one in (q, k, v))
    k_words, v_words = k.view(torch.int64), v.view(torch.int64)
    partial = torch.empty((tokens, 2), dtype=torch.int64, device=q.device)
    words = k_words.shape[3]
    device_code.store[(tokens,)](
        k_words, v_words, row, partial,
        k_words.stride(1), k_words.stride(2), v_words.stride(1), v_words.stride(2),
        kv_heads, words, _power_of_2(kv_heads), _power_of_2(words), 8 * k.itemsize, triton_dtype(k),
    )  # fmt: skip
    queries, keys, splits, options = _tiling(tokens, group, kv_heads, dim, q.dtype)
    out = torch.empty((1, tokens, heads, dim), dtype=q.dtype, device=q.device)
    parts, tops, sums = out, out, out
    if splits > 1:
        parts = torch.empty((splits, tokens, heads, dim), dtype=torch.float32, device=q.device)
        tops, sums = torch.empty((2, splits, tokens, heads), dtype=torch.float32, device=q.device)
    dim_2 = max(16, _power_of_2(dim))
    tiles = -(-tokens * group // queries)
    device_code.attend[(tiles, kv_heads, splits)](
        q, row, partial, out, parts, tops, sums, q.stride(1), q.stride(2), tokens, scale,
        window, cap, kv_heads, group, dim, dim_2, queries, keys, splits, triton_dtype(q), **options,
    )  # fmt: skip
    if splits > 1:
        count = tokens * heads
        device_code.combine[(count,)](
            parts, tops, sums, out, count, dim, dim_2, splits, triton_dtype(q), num_warps=1
        )
    return out


PROGRAMS = 256
"""of `attend`, about as many as fill a large GPU: where tiles and heads are fewer, the keys are split"""


def _tiling(
    tokens: int, group: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[int, int, int, dict[str, int]]:
    """Queries of a tile, keys of a step, splits of the keys, and Triton's options. It depends on shapes alone: equal
    runs on any rank add up in the same order."""
    rows = tokens * group
    large = dim > 128 or dtype == torch.float32
    queries = min(32 if large else 64, max(16, _power_of_2(rows)))
    keys = 32 if large else 64
    tiles = -(-rows // queries) * kv_heads
    splits = 1
    while splits < 32 and tiles * splits * 2 <= PROGRAMS:
        splits *= 2
    return queries, keys, splits, {"num_warps": 4, "num_stages": 2 if large else 3}


def triton_dtype(tensor: Tensor) -> Any:
    """Its dtype, in Triton's words."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[tensor.dtype]


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


# -- on a CPU


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, row: Tensor, scale: float, window: int, cap: float) -> Tensor:
    assert row.shape == (COLUMNS,)
    position, slot, kv, rows, blocks, largest, tokens = row.tolist()
    _, kv_heads, _, dim = k.shape
    stop = position + tokens
    cache = _memory(kv, (stop, 2, kv_heads, dim), k.dtype)
    block = cache[position:]
    block[:, 0].copy_(k[0, :, :tokens].transpose(0, 1))
    block[:, 1].copy_(v[0, :, :tokens].transpose(0, 1))
    if rows:
        digests = row_digests(block)
        _memory(rows, (stop, 2, kv_heads), torch.int64)[position:].copy_(digests)
        _memory(blocks, (slot + 1, 2), torch.int64)[slot].copy_(mixed_sum(digests, first=0))
    if largest:
        values = torch.linalg.vector_norm(block.flatten(2), float("inf"), dim=-1, dtype=torch.float32)
        _memory(largest, (stop, 3), torch.float32)[position:, :2].copy_(values)
    group = q.shape[1] // kv_heads
    keys, values = (cache[:, side].transpose(0, 1).repeat_interleave(group, 0) for side in (0, 1))
    scores = (q[0, :, :tokens] @ keys.transpose(1, 2)) * scale
    if cap:
        scores = torch.tanh(scores / cap) * cap
    behind = torch.arange(position, stop)[:, None] - torch.arange(stop)[None]
    seen = (behind >= 0) & ((behind < window) if window else True)
    weights = scores.masked_fill(~seen, float("-inf")).float().softmax(-1).to(q.dtype)
    out = torch.zeros_like(q).transpose(1, 2).contiguous()
    out[0, :tokens] = (weights @ values).transpose(0, 1)
    return out


def _memory(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that lies there."""
    count = torch.Size(shape).numel()
    return torch.frombuffer(
        (ctypes.c_byte * (count * dtype.itemsize)).from_address(address), dtype=dtype
    ).view(shape)

"""The KV cache of one rank, preallocated, and the window of it that one call of a decoder layer sees.

One tensor a layer, stored [tokens, 2, kv_heads, head_dim], so that the K and V of consecutive tokens are one
contiguous slice that goes on the wire without a copy. All layers share one shape: an architecture whose
layers differ in KV heads or head size (or caches something else than K and V) does not fit. The cache does
not know which rows are filled: whoever drives it says at which position it reads and writes, so rows may land
in any order and nothing has to be truncated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinfer.model.errors import ModelError


class KVCache:
    """K and V of `layers` layers for up to `capacity` tokens (one sequence).

    `kv_heads` and `head_dim` hold for every layer; `nbytes` is the size of it all in bytes. Rows start as
    zeros.
    """

    def __init__(
        self,
        layers: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if min(layers, capacity, kv_heads, head_dim) < 1:
            given = f"layers={layers}, capacity={capacity}, kv_heads={kv_heads}, head_dim={head_dim}"
            raise ModelError(f"a KV cache of {given} cannot be made: all four must be at least 1")
        self.layers, self.capacity = layers, capacity
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.dtype, self.device = dtype, torch.device(device)
        shape = (capacity, 2, kv_heads, head_dim)
        self._tensors = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(layers)]

    @property
    def nbytes(self) -> int:
        """The size of all layers together, in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def tensor(self, layer: int) -> Tensor:
        """Return the buffer of one layer: [capacity, 2, kv_heads, head_dim]; `[:, 0]` is K, `[:, 1]` V."""
        if not 0 <= layer < self.layers:
            raise ModelError(f"layer {layer} is not in this KV cache: its layers are 0 to {self.layers - 1}")
        return self._tensors[layer]

    def block(self, layer: int, start: int, stop: int) -> Tensor:
        """Return tokens [start, stop) of a layer, a contiguous view [stop - start, 2, kv_heads, head_dim]."""
        self._check_rows(start, stop)
        return self.tensor(layer)[start:stop]

    def k(self, layer: int, stop: int, start: int = 0) -> Tensor:
        """Return K of tokens [start, stop) as attention wants it: a view [1, kv_heads, tokens, head_dim]."""
        return self.block(layer, start, stop)[:, 0].transpose(0, 1).unsqueeze(0)

    def v(self, layer: int, stop: int, start: int = 0) -> Tensor:
        """Return V of tokens [start, stop) as attention wants it: a view [1, kv_heads, tokens, head_dim]."""
        return self.block(layer, start, stop)[:, 1].transpose(0, 1).unsqueeze(0)

    def fill(self, kv: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy K and V of every layer, each [1, kv_heads, tokens, head_dim], into the first rows."""
        for number, (k, v) in enumerate(kv):
            self.write(number, 0, k, v)

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Copy K and V, each [1, kv_heads, tokens, head_dim], into the rows from `start` on."""
        rows = self.block(layer, start, start + k.shape[2])
        rows[:, 0].copy_(k[0].transpose(0, 1))
        rows[:, 1].copy_(v[0].transpose(0, 1))

    def moved(self, capacity: int, tokens: int) -> KVCache:
        """Return a cache of another capacity that holds the first `tokens` rows of this one."""
        other = KVCache(self.layers, capacity, self.kv_heads, self.head_dim, self.dtype, self.device)
        for mine, theirs in zip(self._tensors, other._tensors, strict=True):
            theirs[:tokens].copy_(mine[:tokens])
        return other

    def sha256(self, tokens: int) -> str:
        """Return the SHA-256 (hex) of the first `tokens` rows: layer by layer, token by token, K then V.

        Equal for caches of equal bits whatever their capacity, dtype for dtype; at most one layer is copied
        to the CPU at a time.
        """
        digest = hashlib.sha256()
        for layer in range(self.layers):
            rows = self.block(layer, 0, tokens).detach().cpu()
            digest.update(rows.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _check_rows(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.capacity:
            raise ModelError(
                f"tokens {start} to {stop} are not in this KV cache: it holds {self.capacity}; "
                "make it with the capacity of the prompt and all new tokens together"
            )


class CacheWindow:
    """What a decoder layer gets as `past_key_values` while it computes tokens [position, position + length).

    `update` writes K and V of these tokens in place and returns views of all that they may see: tokens [0,
    position + length), or the last `sliding_window - 1` before `position` and these where the layer has a
    sliding window, as transformers' DynamicCache does. What else has landed in the buffer stays invisible. It
    has the part of the interface of `transformers.Cache` that decoder layers and mask functions use, and
    holds no tensors of its own.
    """

    is_compileable = False

    def __init__(self, cache: KVCache, position: int, length: int, sliding_window: int | None = None) -> None:
        cache._check_rows(position, position + length)
        self.cache, self.position, self.length = cache, position, length
        self.start = first_visible(position, sliding_window)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write K and V [1, kv_heads, length, head_dim]; return views [1, kv_heads, visible, head_dim]."""
        stop = self.position + self.length
        expected = (1, self.cache.kv_heads, self.length, self.cache.head_dim)
        if keys.shape != expected or values.shape != expected:
            raise ModelError(
                f"layer {layer_idx} made K {tuple(keys.shape)} and V {tuple(values.shape)}; "
                f"this window takes {expected}"
            )
        self.cache.write(layer_idx, self.position, keys, values)
        return self.cache.k(layer_idx, stop, self.start), self.cache.v(layer_idx, stop, self.start)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return the number of tokens before this window, the same for every layer."""
        return self.position

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return the position of the first token of this window."""
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """Return how many tokens a layer sees with `query_length` new ones, and the first one's position."""
        return self.position + query_length - self.start, self.start


def first_visible(position: int, sliding_window: int | None) -> int:
    """Return the first token that tokens from `position` on are shown: 0, or a window - 1 before them."""
    return 0 if sliding_window is None else max(0, position - sliding_window + 1)

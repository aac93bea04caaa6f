"""The preallocated KV cache of one rank, and the window of it that one call of a decoder layer sees.

There is one tensor a layer, [tokens, 2, kv_heads, head_dim], so that K and V of consecutive tokens are one contiguous
slice that is sent without a copy. All layers share one shape: architectures whose layers differ in KV heads or head
size, or that cache something other than K and V, do not fit. The cache does not track which rows are filled: callers
give the position of each read and write, so rows may arrive in any order and nothing is truncated.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor

from dinfer.errors import ModelError


class KVCache:
    """K and V of `layers` layers for up to `capacity` tokens (one sequence).

    Rows start as zeros. Raises `ModelError` for a size below 1.
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
            raise ModelError(f"a KV cache cannot have {given}: all four must be at least 1")
        self.layers, self.capacity = layers, capacity
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.dtype, self.device = dtype, torch.device(device)
        shape = (capacity, 2, kv_heads, head_dim)
        self._tensors = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(layers)]
        self._sides: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def tensor(self, layer: int) -> Tensor:
        """The tensor of one layer, [capacity, 2, kv_heads, head_dim]; `[:, 0]` is K, `[:, 1]` is V."""
        if not 0 <= layer < self.layers:
            raise ModelError(
                f"layer {layer} is out of range: this KV cache has layers 0 to {self.layers - 1}"
            )
        return self._tensors[layer]

    def sides(self, layer: int) -> tuple[Tensor, Tensor]:
        """All of K and of V of a layer as attention takes them: views [1, kv_heads, capacity, head_dim], made once."""
        tensor, kept = self.tensor(layer), self._sides.get(layer)
        if kept is None or kept[0] is not tensor:  # a subclass may have another one by now
            both = tensor.permute(1, 2, 0, 3).unsqueeze(1)
            kept = self._sides[layer] = tensor, both[0], both[1]
        return kept[1:]

    def block(self, layer: int, start: int, stop: int) -> Tensor:
        """Tokens [start, stop) of a layer, a contiguous view [stop - start, 2, kv_heads, head_dim]."""
        self._check_rows(start, stop)
        return self.tensor(layer)[start:stop]

    def k(self, layer: int, stop: int, start: int = 0) -> Tensor:
        """K of tokens [start, stop) as attention takes it: a view [1, kv_heads, tokens, head_dim]."""
        self._check_rows(start, stop)
        return self.sides(layer)[0].narrow(2, start, stop - start)

    def v(self, layer: int, stop: int, start: int = 0) -> Tensor:
        """V of tokens [start, stop) as attention takes it: a view [1, kv_heads, tokens, head_dim]."""
        self._check_rows(start, stop)
        return self.sides(layer)[1].narrow(2, start, stop - start)

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Copy K and V, each [1, kv_heads, tokens, head_dim], into the rows from `start` on."""
        self._check_rows(start, start + k.shape[2])
        for side, new in zip(self.sides(layer), (k, v), strict=True):
            side.narrow(2, start, new.shape[2]).copy_(new)

    def moved(self, capacity: int, tokens: int) -> "KVCache":
        """A cache of another capacity that holds the first `tokens` rows of this one."""
        other = KVCache(self.layers, capacity, self.kv_heads, self.head_dim, self.dtype, self.device)
        for mine, theirs in zip(self._tensors, other._tensors, strict=True):
            theirs[:tokens].copy_(mine[:tokens])
        return other

    def sha256(self, tokens: int) -> str:
        """The SHA-256 (hex) of the first `tokens` rows: layer by layer, token by token, K then V.

        It does not depend on the capacity. At most one layer at a time is copied to the CPU.
        """
        digest = hashlib.sha256()
        for layer in range(self.layers):
            rows = self.block(layer, 0, tokens).detach().cpu()
            digest.update(rows.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _check_rows(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.capacity:
            raise ModelError(
                f"tokens {start} to {stop} are out of range: this KV cache holds {self.capacity}; "
                "its capacity must cover the prompt and all new tokens"
            )


class VisibleTokens:
    """The part of `transformers.Cache` that mask functions use: tokens before `position`, and the first visible one."""

    def __init__(self, position: int, sliding_window: int | None = None) -> None:
        self.position = position
        self.start = 0 if sliding_window is None else max(0, position - sliding_window + 1)

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """The position of the first new token."""
        return self.position

    get_seq_length = (
        get_query_offset  # mask functions before transformers 5.14, and decoder layers, call it so
    )

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """How many tokens a layer sees with `query_length` new ones, and the position of the first."""
        return self.position + query_length - self.start, self.start


class CacheWindow(VisibleTokens):
    """The `past_key_values` of a decoder layer that computes tokens [position, position + length).

    `update` writes K and V of these tokens into the cache and returns views of the tokens that they attend to: [0,
    position + length), or, with a sliding window, the last `sliding_window - 1` before `position` and these, as
    transformers' DynamicCache does. Other rows of the cache stay invisible. It has the part of the interface of
    `transformers.Cache` that decoder layers use.
    """

    is_compileable = False

    def __init__(self, cache: KVCache, position: int, length: int, sliding_window: int | None = None) -> None:
        cache._check_rows(position, position + length)
        super().__init__(position, sliding_window)
        self.cache, self.length = cache, length

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write K and V [1, kv_heads, length, head_dim]; return views [1, kv_heads, visible, head_dim]."""
        stop = self.position + self.length
        expected = (1, self.cache.kv_heads, self.length, self.cache.head_dim)
        if keys.shape != expected or values.shape != expected:
            raise ModelError(
                f"layer {layer_idx} made K {tuple(keys.shape)} and V {tuple(values.shape)}; "
                f"this cache takes {expected}"
            )
        self.cache.write(layer_idx, self.position, keys, values)
        return self.cache.k(layer_idx, stop, self.start), self.cache.v(layer_idx, stop, self.start)

"""Room: how large a KV cache must be, and one that is filled with K and V from elsewhere."""

from collections.abc import Sequence

from torch import Tensor

from dinfer.engine.faults import Faults
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.errors import ModelError


def capacity(decoder: Decoder, tokens: int, new: int, faults: Faults | None = None) -> int:
    """Rows for a prompt of `tokens` and `new` tokens after it, as far as the model's positions go; and for those that
    faults add, which have no positions of their own."""
    rows = tokens + new * (2 if faults and faults.repeats else 1)
    return min(rows, decoder.max_positions) + (faults.room if faults else 0)


def cache_of(decoder: Decoder, kv_caches: Sequence[tuple[Tensor, Tensor]], new: int) -> KVCache:
    """A cache of these K and V, each [1, kv_heads, tokens, head_dim], with room for `new` tokens. Raises ModelError."""
    if len(kv_caches) != decoder.num_layers:
        raise ModelError(
            f"kv_caches has {len(kv_caches)} layers; this model has {decoder.num_layers}: give K and V of each."
        )
    cache = decoder.new_cache(capacity(decoder, kv_caches[0][0].shape[2], new))
    cache.fill(kv_caches)
    return cache

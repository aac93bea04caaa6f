"""What a decoder layer attends to, and hidden states between layers, computed anew beside the cache.

The weights are those of transformers' own attention module in its eager form, which alone returns them. The KV cache
stays as it is: what a layer writes goes into a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.errors import ModelError
from dinfer.model.positions import Positions


class Attention(NamedTuple):
    """`weights` [heads, queries, keys]; the first key is the token `first_key`, not 0 where the layer has a window."""

    weights: Tensor
    first_key: int


class LayerCopy(KVCache):
    """A copy of the first rows of one layer, so that computing the layer leaves its cache alone.

    `keep`: what the layer writes is dropped, so that it sees the rows that are there.
    """

    def __init__(self, cache: KVCache, layer: int, rows: int, *, keep: bool = False) -> None:
        super().__init__(1, rows, cache.kv_heads, cache.head_dim, cache.dtype, cache.device)
        self._tensors[0].copy_(cache.block(layer, 0, rows))
        self._keep = keep

    def tensor(self, layer: int) -> Tensor:  # noqa: ARG002 - it has but one
        return self._tensors[0]

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        if not self._keep:
            super().write(layer, start, k, v)


@torch.no_grad()
def hidden_before(
    decoder: Decoder,
    chunk: int,
    layer: int,
    known: Mapping[tuple[int, int], Tensor],
    cache: KVCache,
    position: int,
) -> Tensor | None:
    """Return the hidden state of a chunk before `layer`, [1, tokens, hidden_size], None where it cannot be had.

    It is computed from the nearest one `known` by chunk and layer. The chunk's tokens begin at `position`; K and V of
    earlier ones are read from `cache`.
    """
    before = [index for of, index in known if of == chunk and index <= layer]
    if not before:
        return None
    hidden = known[chunk, max(before)]
    for index in range(max(before), layer):
        hidden = decoder.layer(index, hidden, LayerCopy(cache, index, position + hidden.shape[1]), position)
    return hidden


@torch.no_grad()
def attention(decoder: Decoder, layer: int, hidden: Tensor, cache: KVCache, position: int) -> Attention:
    """Return what tokens from `position` on attend to, of the rows that `cache` holds of them and of earlier ones.

    `hidden` [1, tokens, hidden_size] is theirs before `layer`. Raises `ModelError` where the attention does not tell.
    """
    stop = position + hidden.shape[1]
    found = list[Tensor]()
    _eager(decoder, layer, found.append).layer(
        layer, hidden, LayerCopy(cache, layer, stop, keep=True), position
    )
    if not found:
        raise ModelError(f"the attention of layer {layer} returns no weights, so there are none to be shown")
    weights = found[0][0]
    return Attention(weights, stop - weights.shape[-1])


def _eager(decoder: Decoder, layer: int, tell: Callable[[Tensor], None]) -> Decoder:
    """Return a decoder of the same weights that can run this layer alone, whose attention is eager, masks included, and
    calls `tell` with its weights."""
    config = copy.copy(decoder.model.config)
    config._attn_implementation = "eager"
    other, base = copy.copy(decoder), decoder._base
    other._positions = Positions(config, base.rotary_emb, decoder._family.rotary_per_layer_type)
    other._base = SimpleNamespace(layers={layer: _telling(base.layers[layer], config, tell)})
    return other


def _telling(layer: Any, config: Any, tell: Callable[[Tensor], None]) -> Any:
    """Return a copy of a decoder layer that shares its weights; modules copied so have attributes of their own."""
    mine, attend = copy.copy(layer), copy.copy(layer.self_attn)
    mine._modules = {**layer._modules, "self_attn": attend}
    attend.config = config
    forward = attend.forward

    def told(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if output[1] is not None:
            tell(output[1])
        return output

    attend.forward = told
    return mine

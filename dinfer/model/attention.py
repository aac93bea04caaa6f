"""Attention weights of a layer, and hidden states between layers, recomputed without changing the KV cache.

The weights come from transformers' own attention module in its eager form, the only one that returns them. A layer
writes into a copy of its cache rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinfer.errors import ModelError
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.positions import Positions


class Attention(NamedTuple):
    """`weights` [heads, queries, keys]; the first key is token `first_key`, which is above 0 for a sliding window."""

    weights: Tensor
    first_key: int


class LayerCopy(KVCache):
    """A copy of the first rows of one layer, for computing the layer without changing the cache.

    `keep`: drop what the layer writes, so that it attends to the rows of the cache.
    """

    def __init__(self, cache: KVCache, layer: int, rows: int, *, keep: bool = False) -> None:
        super().__init__(1, rows, cache.kv_heads, cache.head_dim, cache.dtype, cache.device)
        self._tensors[0].copy_(cache.block(layer, 0, rows))
        self._keep = keep

    def tensor(self, layer: int) -> Tensor:  # noqa: ARG002 - it holds one layer
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
    """Return the hidden state of a chunk before `layer`, [1, tokens, hidden_size].

    It is computed from the closest earlier one in `known`, by (chunk, layer); None if there is none. The chunk's tokens
    start at `position`; K and V of earlier tokens are read from `cache`.
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
    """Return the attention weights of the tokens from `position` on, over their rows and earlier ones in `cache`.

    `hidden` [1, tokens, hidden_size]: their hidden state before `layer`. Raises `ModelError` if the attention module
    returns no weights.
    """
    stop = position + hidden.shape[1]
    found = list[Tensor]()
    _eager(decoder, layer, found.append).layer(
        layer, hidden, LayerCopy(cache, layer, stop, keep=True), position
    )
    if not found:
        raise ModelError(f"the attention module of layer {layer} returns no weights")
    weights = found[0][0]
    return Attention(weights, stop - weights.shape[-1])


def _eager(decoder: Decoder, layer: int, on_weights: Callable[[Tensor], None]) -> Decoder:
    """Return a decoder of the same weights that can run this layer alone, with eager attention and masks, and calls
    `on_weights` with the attention weights."""
    config = copy.copy(decoder.model.config)
    config._attn_implementation = "eager"
    other, base = copy.copy(decoder), decoder._base
    other._positions = Positions(config, base.rotary_emb, decoder._family.rotary_per_layer_type)
    other._base = SimpleNamespace(layers={layer: _with_weights(base.layers[layer], config, on_weights)})
    return other


def _with_weights(layer: Any, config: Any, on_weights: Callable[[Tensor], None]) -> Any:
    """Return a shallow copy of a decoder layer: it shares the weights and has its own attributes."""
    mine, attend = copy.copy(layer), copy.copy(layer.self_attn)
    mine._modules = {**layer._modules, "self_attn": attend}
    attend.config = config
    forward = attend.forward

    def forward_and_report(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if output[1] is not None:
            on_weights(output[1])
        return output

    attend.forward = forward_and_report
    return mine

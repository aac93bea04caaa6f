"""Attention weights of a layer, and hidden states between layers, recomputed without changing the KV cache.

The weights come from transformers' own attention module in its eager form, the only one that returns them.
"""

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
    """The hidden state of a chunk before `layer`, [1, tokens, hidden_size].

    It is computed from the closest earlier one in `known`, by (chunk, layer); None if there is none. The chunk's tokens
    start at `position`; K and V of earlier tokens are read from `cache`.
    """
    first = max((index for of, index in known if of == chunk and index <= layer), default=None)
    if first is None:
        return None
    hidden = known[chunk, first]
    for index in range(first, layer):
        hidden = decoder.layer(index, hidden, LayerCopy(cache, index, position + hidden.shape[1]), position)
    return hidden


@torch.no_grad()
def attention(decoder: Decoder, layer: int, hidden: Tensor, cache: KVCache, position: int) -> Attention:
    """The attention weights of the tokens from `position` on, over their rows and earlier ones in `cache`.

    `hidden` [1, tokens, hidden_size]: their hidden state before `layer`. Raises `ModelError` if there are no weights.
    """
    stop = position + hidden.shape[1]
    found = list[Tensor]()
    rows = LayerCopy(cache, layer, stop, keep=True)
    _eager(decoder, layer, found.append).layer(layer, hidden, rows, position)
    if not found:
        raise ModelError(f"the attention module of layer {layer} returns no weights")
    weights = found[0][0]
    return Attention(weights, stop - weights.shape[-1])


def _eager(decoder: Decoder, layer: int, on_weights: Callable[[Tensor], None]) -> Decoder:
    """A decoder of the same weights that can run this layer alone, with eager attention and masks, and calls
    `on_weights` with the attention weights. Its modules are shallow copies: they share the weights."""
    config = copy.copy(decoder.model.config)
    config._attn_implementation = "eager"
    other, base = copy.copy(decoder), decoder.base
    mine: Any = copy.copy(base.layers[layer])
    attend = copy.copy(mine.self_attn)
    mine._modules = {**mine._modules, "self_attn": attend}
    attend.config = config
    forward = attend.forward

    def forward_and_report(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if output[1] is not None:
            on_weights(output[1])
        return output

    attend.forward = forward_and_report
    other.positions = Positions(config, base.rotary_emb, decoder.family.rotary_per_layer_type)
    other.base = SimpleNamespace(layers={layer: mine})
    return other

"""What a decoder layer needs to know about positions: ids, rotary embeddings and attention masks.

All of it is made by transformers' own functions and depends only on where the tokens stand, how many they are
and what kind of layer asks, so it is made once for all layers of a kind and kept for the last few runs of
tokens. It does not read the KV cache: masks are sized from the position alone, which is right for a rank that
never runs layer 0 too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinfer.model.cache import first_visible
from dinfer.model.compat import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    get_layer_types_and_kwargs,
)
from dinfer.model.errors import ModelError

KEPT = 8
"""How many placements are kept: enough for every kind of layer of a few runs of tokens at once."""

_MASKS: dict[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


@dataclass(frozen=True)
class LayerKind:
    """Layers that share masks and rotary embeddings: layer type, and window in tokens (None: no window)."""

    layer_type: str
    sliding_window: int | None


@dataclass(frozen=True)
class Placement:
    """Position ids [1, T], rotary cos and sin [1, T, dim], mask [1, 1, T, visible] or None (plain causal)."""

    position_ids: Tensor
    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None


def layer_kinds(config: Any) -> tuple[LayerKind, ...]:
    """Return the kind of every layer of a config; raise `ModelError` for kinds that keep no plain KV."""
    types, options = get_layer_types_and_kwargs(config)
    for layer_type in types:
        if layer_type not in _MASKS:
            raise ModelError(f"layers of type {layer_type!r} are not supported; allowed: {', '.join(_MASKS)}")
    # One dict a layer in transformers 5.23; one for all layers, whatever their type, in 5.17.
    given = [options] * len(types) if isinstance(options, Mapping) else options
    return tuple(LayerKind(name, _window(name, own)) for name, own in zip(types, given, strict=True))


def _window(layer_type: str, options: Mapping[str, Any]) -> int | None:
    return options.get("sliding_window") if layer_type == "sliding_attention" else None


class _Extent:
    """What transformers' mask functions ask of a cache: tokens before, and the first one visible."""

    def __init__(self, position: int, kind: LayerKind) -> None:
        self._position, self._start = position, first_visible(position, kind.sliding_window)

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        return self._position

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        return self._position + query_length - self._start, self._start


class Positions:
    """Makes and keeps the `Placement` of runs of tokens; any number of threads may ask at once."""

    def __init__(self, config: Any, rotary: Callable[..., Any], rotary_per_layer_type: bool) -> None:
        self._config, self._rotary, self._per_type = config, rotary, rotary_per_layer_type
        self._kept: OrderedDict[tuple[int, int, LayerKind], Placement] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, kind: LayerKind, position: int, hidden: Tensor) -> Placement:
        """Return the placement of the tokens of `hidden` [1, T, H], the first one at `position`."""
        key = (position, hidden.shape[1], kind)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._make(kind, position, hidden)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _make(self, kind: LayerKind, position: int, hidden: Tensor) -> Placement:
        ids = torch.arange(hidden.shape[1], device=hidden.device) + position
        ids = ids.unsqueeze(0)
        rotary = self._rotary(hidden, ids, kind.layer_type) if self._per_type else self._rotary(hidden, ids)
        mask = _MASKS[kind.layer_type](
            config=self._config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=_Extent(position, kind),
            position_ids=ids,
            layer_idx=0,
        )
        return Placement(ids, rotary, mask)

"""Position ids, rotary embeddings and attention masks of a decoder layer.

transformers' own functions make them. They depend only on the tokens' position and number and on the kind of layer, so
they are made once for all layers of a kind and kept for the last few token ranges. Masks are sized from the position
and not from the KV cache, which also fits a rank that never runs layer 0.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from dinfer.errors import ModelError
from dinfer.model.cache import VisibleTokens


def get_layer_types_and_kwargs(config: Any) -> tuple[list[str], Any]:
    """The type of every layer's cache, and options: one dict a layer, or one for all (transformers 5.17).

    Before 5.17 transformers has no such function; this is the rule by which its DynamicCache then makes its layers.
    """
    from transformers import cache_utils

    if theirs := getattr(cache_utils, "get_layer_types_and_kwargs", None):
        types, options = theirs(config)
        return list(types), options
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    usual = "sliding_attention" if window else "chunked_attention" if chunk else "full_attention"
    types = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
    return list(types), {"sliding_window": window}


def _for_any_version(make: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function as of 5.14, which takes `layer_idx`, whatever version it comes from."""
    if "layer_idx" in signature(make).parameters:
        return make

    def made(*, layer_idx: int, **given: Any) -> Any:  # noqa: ARG001
        return make(**given)

    return made


_MASKS = {
    "full_attention": "create_causal_mask",
    "sliding_attention": "create_sliding_window_causal_mask",
}
"""transformers' mask function for each layer type"""


@cache
def _mask_of(layer_type: str) -> Callable[..., Any]:
    from transformers import masking_utils  # brings torch._dynamo and sympy, too

    return _for_any_version(getattr(masking_utils, _MASKS[layer_type]))


KEPT = 8
"""how many placements are kept: every kind of layer for a few token ranges"""


@dataclass(frozen=True)
class LayerKind:
    """Layers that share masks and rotary embeddings: the layer type, and the window in tokens (None: no window)."""

    layer_type: str
    sliding_window: int | None


@dataclass(frozen=True)
class Placement:
    """Position ids [1, T], rotary cos and sin [1, T, dim], mask [1, 1, T, visible] or None (plain causal)."""

    position_ids: Tensor
    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None


def layer_kinds(config: Any) -> tuple[LayerKind, ...]:
    """The kind of every layer of a config. Raises `ModelError` for kinds without plain KV."""
    types, options = get_layer_types_and_kwargs(config)
    if unknown := [name for name in types if name not in _MASKS]:
        raise ModelError(f"layers of type {unknown[0]!r} are not supported; supported: {', '.join(_MASKS)}")
    # One dict a layer in transformers 5.23; one for all layers in 5.17.
    given = [options] * len(types) if isinstance(options, Mapping) else options
    return tuple(
        LayerKind(name, own.get("sliding_window") if name == "sliding_attention" else None)
        for name, own in zip(types, given, strict=True)
    )


class Positions:
    """Makes and keeps the `Placement` of token ranges. Thread-safe."""

    def __init__(self, config: Any, rotary: Callable[..., Any], rotary_per_layer_type: bool) -> None:
        self._config, self._rotary, self._per_type = config, rotary, rotary_per_layer_type
        self._kept: OrderedDict[tuple[int, int, LayerKind], Placement] = OrderedDict()
        self._lock = threading.Lock()

    def angles(self, kind: LayerKind, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary angles of the first `count` positions, each [1, count, head_dim], in the dtype
        and on the device of `like`, a hidden state."""
        ids = torch.arange(count, device=like.device).unsqueeze(0)
        cosine, sine = self._rotary(like, ids, *((kind.layer_type,) if self._per_type else ()))
        return cosine, sine

    def of(self, kind: LayerKind, position: int, hidden: Tensor) -> Placement:
        """The placement of the tokens of `hidden` [1, T, hidden_size], the first one at `position`."""
        key = (position, hidden.shape[1], kind)
        with self._lock:
            if key not in self._kept:
                ids = (torch.arange(hidden.shape[1], device=hidden.device) + position).unsqueeze(0)
                of_type = (kind.layer_type,) if self._per_type else ()
                mask = _mask_of(kind.layer_type)(
                    config=self._config,
                    inputs_embeds=hidden,
                    attention_mask=None,
                    past_key_values=VisibleTokens(position, kind.sliding_window),
                    position_ids=ids,
                    layer_idx=0,
                )
                self._kept[key] = Placement(ids, self._rotary(hidden, ids, *of_type), mask)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

"""What differs between the versions of transformers that dinfer supports, under the names of the newest one."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from transformers import cache_utils, masking_utils


def get_layer_types_and_kwargs(config: Any) -> tuple[list[str], Any]:
    """The type of every layer's cache, and options: one dict a layer, or one for all (transformers 5.17).

    Before 5.17 transformers has no such function; this is the rule by which its DynamicCache then makes its layers.
    """
    if theirs := getattr(cache_utils, "get_layer_types_and_kwargs", None):
        types, options = theirs(config)
        return list(types), options
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    usual = "sliding_attention" if window else "chunked_attention" if chunk else "full_attention"
    types = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
    return list(types), {"sliding_window": window}


class _Extent:
    """The mask functions' view of a cache, before 5.14: `get_seq_length` in place of `get_query_offset`."""

    def __init__(self, newer: Any) -> None:
        self.get_seq_length, self.get_mask_sizes = newer.get_query_offset, newer.get_mask_sizes


def _for_any_version(make: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function as of 5.14, which takes `layer_idx`, whatever version it comes from."""
    if "layer_idx" in signature(make).parameters:
        return make

    def made(*, past_key_values: Any, layer_idx: int, **given: Any) -> Any:  # noqa: ARG001
        return make(past_key_values=_Extent(past_key_values), **given)

    return made


create_causal_mask = _for_any_version(masking_utils.create_causal_mask)
create_sliding_window_causal_mask = _for_any_version(masking_utils.create_sliding_window_causal_mask)

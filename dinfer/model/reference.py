"""What transformers itself makes of a prompt: the answer that dinfer's own runs are compared with.

Uses the model's own forward, its `DynamicCache` and `generate`; nothing of dinfer but the loaded weights. Run
it with the thread count of the ranks: float32 attention differs between 1 and 2 threads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from dinfer.model.decoder import Decoder
from dinfer.model.errors import ModelError


class Reference(NamedTuple):
    """KV of every layer, each [tokens, 2, kv_heads, head_dim], and normed hidden [1, tokens, hidden_size]."""

    kv: list[Tensor]
    hidden: Tensor


@torch.no_grad()
def chunked_forward(decoder: Decoder, ids: Sequence[int], chunk_size: int) -> Reference:
    """Run transformers' forward on `ids`, `chunk_size` tokens at a time, and return KV and hidden states."""
    if chunk_size < 1 or not ids:
        raise ModelError(
            f"{len(ids)} tokens in chunks of {chunk_size} cannot be run: both must be at least 1"
        )
    cache: Any = DynamicCache(config=decoder.model.config)
    kv = [_record(layer) for layer in cache.layers]
    base, hidden = decoder.model.get_decoder(), []
    for start in range(0, len(ids), chunk_size):
        chunk = torch.tensor([list(ids[start : start + chunk_size])], device=decoder.device)
        hidden.append(base(input_ids=chunk, past_key_values=cache, use_cache=True).last_hidden_state)
    return Reference([torch.cat(rows) for rows in kv], torch.cat(hidden, dim=1))


def unchunked(decoder: Decoder, ids: Sequence[int]) -> Reference:
    """Run transformers' forward on all `ids` at once; chunked runs differ by rounding (1e-6 in float32)."""
    return chunked_forward(decoder, ids, max(1, len(ids)))


@torch.no_grad()
def generate(decoder: Decoder, ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Return the new tokens of transformers' greedy `generate`, the token that ends the text included."""
    prompt = torch.tensor([list(ids)], device=decoder.device)
    eos = sorted(decoder.eos_ids) or None
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos[0] if eos else None
    )
    # A shallow copy shares the weights; its own generation config keeps out the checkpoint's (repetition
    # penalty, …), which generate would merge into any config that it is given.
    model = copy.copy(decoder.model)
    model.generation_config = config
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    new: list[int] = output[0, len(ids) :].tolist()
    return new


def _record(layer: Any) -> list[Tensor]:
    """Return a list that gets K and V of every update of a cache layer: [new tokens, 2, kv_heads, head_dim].

    Layers with a sliding window forget; transformers' own past recording shows layers too much in 5.17.
    """
    update, rows = layer.update, []

    def recorded(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(torch.stack([keys[0], values[0]], dim=1).permute(2, 1, 0, 3).contiguous())
        return update(keys, values, *args, **kwargs)

    layer.update = recorded
    return rows

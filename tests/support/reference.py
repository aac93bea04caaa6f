"""What transformers itself computes from a prompt: the answer that dinfer's runs are compared with. Not a test."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from dinfer.model.decoder import Decoder
from dinfer.model.reference import Forward


class Reference(NamedTuple):
    """`kv`: of every layer, each [tokens, 2, kv_heads, head_dim]; `hidden`: normed, [1, tokens, hidden_size]."""

    kv: list[Tensor]
    hidden: Tensor


def chunked_forward(decoder: Decoder, ids: Sequence[int], chunk_size: int) -> Reference:
    """Run transformers' forward on `ids`, `chunk_size` tokens at a time, and return KV and hidden states."""
    kv: list[list[Tensor]] = [[] for _ in range(decoder.num_layers)]
    forward = Forward(decoder, lambda what, layer, rows: kv[layer].append(rows) if what == "kv" else None)
    hidden = [
        forward.feed(ids[start : start + chunk_size]).hidden for start in range(0, len(ids), chunk_size)
    ]
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

"""A checkpoint that says one thing over and over: for tests of text on its way. Not a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.model.tiny import tiny_checkpoint


def parrot_checkpoint(folder: Path, saying: str) -> Path:
    """Write a model of which each token says the next one of `saying`, byte by byte and round in a circle.

    No byte may occur twice in `saying`. Attention and MLP are switched off, so the last token alone decides.
    """
    tiny_checkpoint(folder, layers=3, tokenizer=True)
    tokens = AutoTokenizer.from_pretrained(folder).encode(saying)
    assert len(set(tokens)) == len(tokens)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        model.model.norm.weight.fill_(1.0)
        for token, following in zip(tokens, [*tokens[1:], tokens[0]], strict=True):
            head[following] = embedding[token] / embedding[token].norm()
    model.save_pretrained(folder)
    return folder

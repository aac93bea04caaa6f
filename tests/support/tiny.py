"""Tiny random checkpoints for tests: real transformers models, small enough to run a prompt in milliseconds.

Not a test. Weights are drawn from a seed and scaled up, so that greedy decoding wanders over the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from dinfer.model.families import FAMILIES

CONFIGS: dict[str, Any] = {name: CONFIG_MAPPING[name] for name in FAMILIES}
VOCAB = 128
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_checkpoint(
    folder: str | Path,
    family: str = "qwen3",
    layers: int = 7,
    seed: int = 0,
    dtype: str = "float32",
    tied: bool = False,
    tokenizer: bool = False,
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Write a random checkpoint to `folder` and return it: hidden 64, 4 heads, 2 KV heads of 16.

    `tied` shares the embedding with the head; `tokenizer` adds a byte-level tokenizer (vocabulary 259 instead
    of 128); `max_shard_size` splits the weights over files; `config` overrides entries of its config.json.
    The same arguments give the same bytes.
    """
    sizes: dict[str, Any] = {
        "vocab_size": len(byte_tokenizer()) if tokenizer else VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model = random_model(CONFIGS[family](**{**sizes, **config}), seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return Path(folder)


def random_model(config: Any, seed: int = 0) -> Any:
    """Return a float32 model of `config` in eval mode with weights drawn from `seed`."""
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(1 + seed)  # 0 happens to draw a Qwen3 that repeats itself
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            # Norms stay near 1; matrices keep the size of what passes through them, and some more.
            scale = 0.1 if weight.ndim == 1 else 1.2 / weight.shape[-1] ** 0.5
            drawn = torch.randn(weight.shape, generator=generator) * scale
            weight.copy_(1 + drawn if name.endswith("norm.weight") else drawn)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte, which splits all but ASCII; 256, `<|end|>`, ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast

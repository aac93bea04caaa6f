"""What differs between the supported architectures, as data: one `Family` for each `model_type`.

A new architecture of the same build (embedding, decoder layers, final norm, head) is one entry in `FAMILIES`.
This module holds no code that computes and does not import torch, so a checkpoint can be judged without
loading anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dinfer.model.errors import ModelError


@dataclass(frozen=True)
class Family:
    """How one architecture departs from the plain decoder; scales are given as names of config entries.

    `attention` is the transformers attention implementation (eager where SDPA cannot do what the layer asks,
    as softcapped scores); `embedding_scale` multiplies embeddings outside the embedding module (Granite);
    `logits_divisor` and `logits_softcap` act on the head's output (Granite; Gemma2 and 3);
    `rotary_per_layer_type` says that the rotary module wants a layer type (Gemma3); `default_head_dim` is
    what its config takes for a missing head_dim, None meaning hidden size / heads.
    """

    attention: str = "sdpa"
    embedding_scale: str | None = None
    logits_divisor: str | None = None
    logits_softcap: str | None = None
    rotary_per_layer_type: bool = False
    default_head_dim: int | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen3": Family(default_head_dim=128),
}

_REFUSED: dict[str, str] = {
    "gemma4": "its layers take a second input for each layer (per_layer_input)",
    "gemma4_text": "its layers take a second input for each layer (per_layer_input)",
    "qwen3_next": "its linear-attention layers carry a recurrent state, not K and V",
    "mamba": "its layers carry a recurrent state, not K and V",
    "mamba2": "its layers carry a recurrent state, not K and V",
    "deepseek_v3": "its attention caches a compressed latent instead of K and V heads of one size",
}


def family_named(model_type: str) -> Family:
    """Return the family of a `model_type`; raise `ModelError` with the reason where there is none."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = _REFUSED.get(model_type, "nobody has yet shown it bit-equal to transformers")
    raise ModelError(
        f"architecture {model_type!r} is not supported: {reason}. "
        f"Supported: {', '.join(sorted(FAMILIES))}. Choose a checkpoint of one of these."
    )


def family_of(config: Any) -> Family:
    """Return the family of a config (anything with a `model_type`); `ModelError` where there is none."""
    return family_named(str(getattr(config, "model_type", None)))

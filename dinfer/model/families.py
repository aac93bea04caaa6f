"""The supported architectures as data: one `Family` for each `model_type`.

A new architecture with the same structure (embedding, decoder layers, final norm, head) needs an entry in `FAMILIES`
and one in the conformance test. `_REFUSED` has those known not to fit, with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dinfer.errors import ModelError


@dataclass(frozen=True)
class Family:
    """How an architecture differs from the plain decoder; scales are names of config entries.

    `attention`: the transformers attention implementation (eager where SDPA lacks a feature, such as softcapped
    scores). `embedding_scale`: multiplies embeddings outside the embedding module (Granite). `logits_divisor`,
    `logits_softcap`: act on the head's output (Granite; Gemma2 and 3). `rotary_per_layer_type`: the rotary module takes
    a layer type (Gemma3). `rebuilds_weights`: loading makes new tensors (a layer's experts become one), so weights are
    not views of the files.
    """

    attention: str = "sdpa"
    embedding_scale: str | None = None
    logits_divisor: str | None = None
    logits_softcap: str | None = None
    rotary_per_layer_type: bool = False
    rebuilds_weights: bool = False


FAMILIES: dict[str, Family] = {
    "gemma2": Family(attention="eager", logits_softcap="final_logit_softcapping"),
    "gemma3_text": Family(logits_softcap="final_logit_softcapping", rotary_per_layer_type=True),
    "granite": Family(embedding_scale="embedding_multiplier", logits_divisor="logits_scaling"),
    "llama": Family(),
    "mistral": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(rebuilds_weights=True),
    "smollm3": Family(),
}

_ENCODER = "it is an encoder-decoder, not a decoder alone"

_REASONS: dict[str, str] = {
    "its layers take a second input for each layer (per_layer_input)": (
        "gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text"
    ),
    "its layers, or some of them, carry a recurrent state, not K and V": (
        "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear mamba mamba2 minimax "
        "nemotron_h olmo_hybrid qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen3_next recurrent_gemma "
        "rwkv xlstm zamba zamba2"
    ),
    "some of its layers carry the state of a convolution, not K and V": "lfm2 lfm2_moe",
    "its attention caches a compressed latent instead of K and V heads of one size": (
        "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 mistral4"
    ),
    "its text layers take positions in time, height and width, not one position a token": (
        "glm4v glm4v_moe qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text qwen3_vl qwen3_vl_text "
        "qwen3_vl_moe qwen3_vl_moe_text qwen2_5_omni qwen3_omni_moe"
    ),
    "its text layers attend to an image too (cross-attention), and cache that": "mllama mllama_text_model",
    _ENCODER: (
        "bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian mbart mt5 mvp "
        "nllb-moe pegasus pegasus_x plbart prophetnet speech-encoder-decoder speech_to_text speecht5 "
        "switch_transformers t5 t5gemma t5gemma2 udop umt5 vision-encoder-decoder whisper"
    ),
}

_REFUSED: dict[str, str] = {name: reason for reason, names in _REASONS.items() for name in names.split()}


def family_named(model_type: str, reason: str = "") -> Family:
    """The family of a `model_type`. Raises `ModelError` with the reason for an unsupported one."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    untested = "it has not been tested for bit-equality with transformers"
    raise ModelError(
        f"architecture {model_type!r} is not supported: {reason or _REFUSED.get(model_type, untested)}. "
        f"Supported: {', '.join(sorted(FAMILIES))}. Choose a checkpoint of one of these."
    )


def family_of(config: Any) -> Family:
    """The family of a config or `Spec`. Raises `ModelError` for an unsupported one."""
    return family_named(str(getattr(config, "model_type", None)))


def family_in(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises `ModelError` with the reason for an unsupported one.

    Unlike `family_named` it recognizes encoder-decoders and multimodal wrappers of any name.
    """
    if not config.get("model_type"):
        raise ModelError(
            "config.json does not say its model_type, so it is not that of a checkpoint of transformers. "
            f"Supported: {', '.join(sorted(FAMILIES))}. Choose a checkpoint of one of these."
        )
    model_type, reason = str(config["model_type"]), ""
    parts = ("text_config", "llm_config", "language_config", "thinker_config")
    texts = [text for part in parts if isinstance(text := config.get(part), Mapping)]
    if model_type in _REFUSED:
        pass
    elif config.get("is_encoder_decoder"):
        reason = _ENCODER
    elif texts and (text_type := texts[0].get("model_type")) in FAMILIES:
        reason = f"it is multimodal; its text part, {text_type!r}, is supported: save that part as its own checkpoint"
    elif texts:
        text_type = texts[0].get("model_type") or "of unknown type"
        reason = f"it is multimodal, and its text part ({text_type}) is not supported either"
    return family_named(model_type, reason)

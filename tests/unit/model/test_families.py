"""Families: supported and refused by name, with a reason, before any weights are read."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, GPT2Config

from dinfer.errors import ModelError
from dinfer.model.checkpoint import check
from dinfer.model.families import FAMILIES, family_in, family_named, family_of
from tests.support.tiny import CONFIGS, tiny_checkpoint


def refused(**config: Any) -> str:
    """Return why a config.json is refused."""
    with pytest.raises(ModelError, match="is not supported") as caught:
        family_in(config)
    return str(caught.value)


def test_families_are_found_by_name_and_by_config() -> None:
    for name, config in CONFIGS.items():
        assert family_of(config()) is family_named(name) is family_in({"model_type": name}) is FAMILIES[name]


def test_the_reason_for_a_refusal_is_said() -> None:
    with pytest.raises(
        ModelError, match="'mamba' is not supported: its layers, or some of them, carry a recurr"
    ):
        family_named("mamba")
    with pytest.raises(ModelError, match=r"has not been tested .* Supported: gemma2, .*, smollm3\."):
        family_of(GPT2Config())


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma4", "a second input for each layer"),
        ("gemma3n", "a second input for each layer"),
        ("qwen3_next", "carry a recurrent state"),
        ("qwen3_5", "carry a recurrent state"),
        ("jamba", "carry a recurrent state"),
        ("granitemoehybrid", "carry a recurrent state"),
        ("lfm2", "state of a convolution"),
        ("deepseek_v3", "compressed latent"),
        ("qwen2_5_vl", "time, height and width"),
        ("mllama", "cross-attention"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("whisper", "encoder-decoder"),
    ],
)
def test_what_is_known_not_to_fit_is_refused_before_weights_are_looked_for(
    tmp_path: Path, model_type: str, reason: str
) -> None:
    config = CONFIG_MAPPING[model_type]()
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{model_type!r} is not supported: .*{reason}"):
        check(tmp_path)


def test_an_encoder_decoder_of_any_name_is_refused() -> None:
    assert "encoder-decoder" in refused(model_type="new", is_encoder_decoder=True)


@pytest.mark.parametrize(
    ("wrapper", "text"),
    [("gemma3", "gemma3_text"), ("mistral3", "mistral"), ("llava", "llama"), ("idefics3", "llama")],
)
def test_a_wrapper_whose_text_part_would_fit_says_so(tmp_path: Path, wrapper: str, text: str) -> None:
    CONFIG_MAPPING[wrapper]().save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=rf"{wrapper!r} .* multimodal; its text part, {text!r}, is supported"
    ):
        check(tmp_path)


def test_a_wrapper_whose_text_part_does_not_fit_says_so() -> None:
    assert "its text part (cohere2) is not supported either" in refused(
        model_type="aya_vision", text_config={"model_type": "cohere2"}
    )
    assert "of unknown type" in refused(model_type="new", llm_config={})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "has layers of type linear_attention"),
        ({"use_bidirectional_attention": True}, "attends to later tokens too"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "has rope type 'dynamic'"),
    ],
)
def test_entries_that_no_family_allows(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    path = tiny_checkpoint(tmp_path, "gemma3_text", layers=2)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(ModelError, match=message):
        check(path)

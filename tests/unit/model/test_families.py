"""Families: found by name, refused with a reason, and nothing but an entry is needed for a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig, GraniteConfig

from dinfer.model import reference
from dinfer.model.decoder import Decoder
from dinfer.model.errors import ModelError
from dinfer.model.families import FAMILIES, Family, family_named, family_of
from tests.unit.model.tiny import CONFIGS, tiny_checkpoint

IDS = [(token * 37 + 11) % 120 for token in range(30)]
GEMMA = {"sliding_window": 9, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0}

# Not in the table yet: each shows that its entry would be enough, and what each field of an entry does.
CANDIDATES: dict[str, tuple[type[Any], Family, dict[str, Any]]] = {
    "granite": (
        GraniteConfig,
        Family(embedding_scale="embedding_multiplier", logits_divisor="logits_scaling"),
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    ),
    "gemma2": (Gemma2Config, Family(attention="eager", logits_softcap="final_logit_softcapping"), GEMMA),
    "gemma3_text": (
        Gemma3TextConfig,
        Family(logits_softcap="final_logit_softcapping", rotary_per_layer_type=True),
        GEMMA,
    ),
}


def test_families_are_found_by_name_and_by_config() -> None:
    for name, config in CONFIGS.items():
        assert family_of(config()) is family_named(name) is FAMILIES[name]


def test_the_reason_for_a_refusal_is_said() -> None:
    with pytest.raises(ModelError, match="'mamba' is not supported: its layers carry a recurrent state"):
        family_named("mamba")
    with pytest.raises(ModelError, match=r"nobody has yet shown it .* Supported: llama, qwen3\."):
        family_of(GraniteConfig())


@pytest.mark.parametrize("name", CANDIDATES)
def test_an_entry_is_enough_for_a_new_family(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, family, sizes = CANDIDATES[name]
    monkeypatch.setitem(FAMILIES, name, family)
    monkeypatch.setitem(CONFIGS, name, config)
    decoder = Decoder.load(tiny_checkpoint(tmp_path, name, **sizes))
    cache = decoder.new_cache(len(IDS))
    chunks = [decoder.norm(decoder.forward(IDS[at : at + 13], cache, at)) for at in range(0, len(IDS), 13)]
    expected = reference.chunked_forward(decoder, IDS, 13)
    assert torch.equal(torch.cat(chunks, dim=1), expected.hidden)
    assert all(torch.equal(cache.tensor(layer), rows) for layer, rows in enumerate(expected.kv))
    whole = decoder.norm(decoder.forward(IDS, decoder.new_cache(len(IDS)), 0))[:, -1:]
    logits = decoder.model(torch.tensor([IDS]), logits_to_keep=1).logits[0, 0]
    assert torch.equal(decoder.logits(whole), logits)

"""Every family, through the real loading path, against transformers: bit for bit, and greedy tokens.

A new family is one entry here and one in `families.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.families import FAMILIES
from tests.support import reference
from tests.support.tiny import tiny_checkpoint

PROMPT = [(token * 37 + 11) % 120 for token in range(50)]
CHUNK, NEW_TOKENS, LAYERS = 13, 12, 4
WINDOW = 8  # shorter than a chunk and than the prompt, so that it slides

GEMMA = {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 16,
    "final_logit_softcapping": 5.0,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
}

TINY: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0},
    "gemma3_text": GEMMA,
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"partial_rotary_factor": 0.5},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [2],
    },
    "smollm3": {"no_rope_layer_interval": 2},
}


def load(folder: Path, family: str, **options: Any) -> Decoder:
    """Write a tiny checkpoint of a family and load it."""
    return Decoder.load(tiny_checkpoint(folder, family, layers=LAYERS, **TINY[family], **options))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family_decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A decoder of each family in turn, float32, its head not tied to its embedding."""
    return load(tmp_path_factory.mktemp(request.param), request.param)


def check_bit_equal(decoder: Decoder, chunk_size: int = CHUNK) -> None:
    """Hidden states and KV, chunk after chunk and layer by layer, are those of transformers."""
    cache, chunks = decoder.new_cache(len(PROMPT)), []
    for at in range(0, len(PROMPT), chunk_size):
        chunks.append(decoder.norm(decoder.forward(PROMPT[at : at + chunk_size], cache, at)))
    expected = reference.chunked_forward(decoder, PROMPT, chunk_size)
    assert torch.equal(torch.cat(chunks, dim=1), expected.hidden)
    for layer, rows in enumerate(expected.kv):
        assert rows.abs().sum() > 0
        assert torch.equal(cache.tensor(layer), rows), f"KV of layer {layer}"


def decode(decoder: Decoder, cache: KVCache) -> list[int]:
    """Prefill in chunks, then decode greedily."""
    for at in range(0, len(PROMPT), CHUNK):
        hidden = decoder.forward(PROMPT[at : at + CHUNK], cache, at)
    tokens: list[int] = []
    for position in range(len(PROMPT), len(PROMPT) + NEW_TOKENS):
        tokens.append(int(decoder.logits(decoder.norm(hidden[:, -1:])).argmax()))
        hidden = decoder.forward(tokens[-1:], cache, position)
    return tokens


def test_every_family_has_an_entry() -> None:
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("chunk_size", [CHUNK, 5])
def test_prefill_equals_transformers_bit_for_bit(family_decoder: Decoder, chunk_size: int) -> None:
    check_bit_equal(family_decoder, chunk_size)


def test_a_stage_runs_some_layers_only(family_decoder: Decoder) -> None:
    decoder = family_decoder
    whole, stage = decoder.new_cache(len(PROMPT)), decoder.new_cache(len(PROMPT))
    for at in range(0, len(PROMPT), CHUNK):
        hidden = decoder.embed(PROMPT[at : at + CHUNK])
        for layer in range(2):
            hidden = decoder.layer(layer, hidden, whole, at)
        alone = hidden
        for layer in range(2, LAYERS):
            hidden = decoder.layer(layer, hidden, whole, at)
            alone = decoder.layer(layer, alone, stage, at)
        assert torch.equal(alone, hidden)
    assert all(torch.equal(stage.tensor(layer), whole.tensor(layer)) for layer in range(2, LAYERS))
    assert not any(stage.tensor(layer).any() for layer in range(2))


def test_greedy_decode_equals_generate(family_decoder: Decoder) -> None:
    tokens = decode(family_decoder, family_decoder.new_cache(len(PROMPT) + NEW_TOKENS))
    assert tokens == reference.generate(family_decoder, PROMPT, NEW_TOKENS)
    assert len(set(tokens)) > 3, "a random model that repeats itself proves nothing"


def test_logits_equal_the_models_own(family_decoder: Decoder) -> None:
    hidden = family_decoder.forward(PROMPT, family_decoder.new_cache(len(PROMPT)), 0)
    logits = family_decoder.model(torch.tensor([PROMPT]), logits_to_keep=1).logits[0, 0]
    assert torch.equal(family_decoder.logits(family_decoder.norm(hidden)[:, -1:]), logits)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sharded_tied_bfloat16_equals_transformers_bit_for_bit(tmp_path: Path, family: str) -> None:
    decoder = load(tmp_path, family, dtype="bfloat16", tied=True, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert decoder.dtype == torch.bfloat16
    assert decoder.model.lm_head.weight is decoder.model.get_input_embeddings().weight
    check_bit_equal(decoder)


def test_windows_slide_where_they_are_set(tmp_path: Path) -> None:
    slid = load(tmp_path, "mistral")
    cache, other = slid.new_cache(len(PROMPT)), slid.new_cache(len(PROMPT))
    far = [*PROMPT[:-1], PROMPT[-1]]
    far[0] += 1  # outside what four layers of this window let the last token see
    last = slid.forward(PROMPT, cache, 0)[:, -1]
    assert torch.equal(last, slid.forward(far, other, 0)[:, -1])
    assert not torch.equal(cache.tensor(0)[0], other.tensor(0)[0])

"""Attention weights equal transformers', and hidden states recomputed without the cache equal the forward's."""

from pathlib import Path

import pytest
import torch

from dinfer.model.attention import attention, hidden_before
from dinfer.model.decoder import Decoder
from dinfer.model.families import FAMILIES
from tests.support.tiny import tiny_checkpoint

IDS, CHUNK = [7, 3, 99, 3, 20, 64, 5, 81], 4


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_that_the_model_itself_tells(family: str, tmp_path: Path) -> None:
    decoder = Decoder.load(tiny_checkpoint(tmp_path, family, layers=3))
    cache, known = decoder.new_cache(len(IDS)), {}
    for chunk, start in enumerate((0, CHUNK)):
        hidden = known[chunk, 0] = decoder.embed(IDS[start : start + CHUNK])
        for layer in range(decoder.num_layers):
            hidden = decoder.layer(layer, hidden, cache, start)
    before = cache.sha256(len(IDS))
    implementation = decoder.model.config._attn_implementation
    decoder.model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = decoder.model(torch.tensor([IDS]), output_attentions=True, use_cache=False).attentions
    decoder.model.set_attn_implementation(implementation)
    for layer in range(decoder.num_layers):
        state = hidden_before(decoder, 1, layer, known, cache, CHUNK)
        assert state is not None
        found = attention(decoder, layer, state, cache, CHUNK)
        whole = torch.zeros(found.weights.shape[0], CHUNK, len(IDS))
        whole[:, :, found.first_key :] = found.weights
        assert torch.allclose(whole, expected[layer][0][:, CHUNK:, : len(IDS)], atol=2e-5)
    assert cache.sha256(len(IDS)) == before
    assert decoder.model.config._attn_implementation == implementation


def test_a_hidden_state_from_nowhere_is_none(llama: Decoder) -> None:
    assert hidden_before(llama, 1, 2, {(0, 0): torch.zeros(1, 1, 64)}, llama.new_cache(4), 2) is None

"""The decoder, step by step, against transformers' own forward and generate: bit for bit."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinfer.errors import ModelError
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from tests.support import reference
from tests.support.tiny import tiny_checkpoint

PROMPT = [(token * 37 + 11) % 120 for token in range(50)]


def prefill(decoder: Decoder, cache: KVCache, chunk_size: int, ids: list[int] = PROMPT) -> Tensor:
    """Run chunk after chunk, layer by layer; return the hidden state of all tokens before the norm."""
    starts = range(0, len(ids), chunk_size)
    return torch.cat([decoder.forward(ids[at : at + chunk_size], cache, at) for at in starts], dim=1)


@pytest.mark.parametrize("chunk_size", [13, 1, 50, 64])
def test_chunks_layer_by_layer_equal_transformers_bit_for_bit(decoder: Decoder, chunk_size: int) -> None:
    cache = decoder.new_cache(60)
    hidden = decoder.norm(prefill(decoder, cache, chunk_size))
    expected = reference.chunked_forward(decoder, PROMPT, chunk_size)
    assert torch.equal(hidden, expected.hidden)
    for layer, rows in enumerate(expected.kv):
        assert torch.equal(cache.block(layer, 0, len(PROMPT)), rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_equals_transformers_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    decoder = Decoder.load(tiny_checkpoint(tmp_path, "qwen3", dtype=dtype, tied=True))
    assert decoder.dtype == getattr(torch, dtype)
    cache = decoder.new_cache(50)
    hidden = decoder.norm(prefill(decoder, cache, 13))
    expected = reference.chunked_forward(decoder, PROMPT, 13)
    assert torch.equal(hidden, expected.hidden)
    assert all(torch.equal(cache.tensor(layer), rows) for layer, rows in enumerate(expected.kv))
    assert decoder.logits(hidden[:, -1:]).dtype == torch.float32


def test_sliding_windows_equal_transformers_and_keep_all_tokens(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen3", use_sliding_window=True, sliding_window=9, max_window_layers=3)
    decoder = Decoder.load(path)
    for chunk_size in (13, 8, 1):
        cache = decoder.new_cache(50)
        hidden = decoder.norm(prefill(decoder, cache, chunk_size))
        expected = reference.chunked_forward(decoder, PROMPT, chunk_size)
        assert torch.equal(hidden, expected.hidden)
        assert all(torch.equal(cache.tensor(layer), rows) for layer, rows in enumerate(expected.kv))


def test_chunked_is_close_to_unchunked(decoder: Decoder) -> None:
    cache = decoder.new_cache(50)
    hidden = decoder.norm(prefill(decoder, cache, 13))
    expected = reference.unchunked(decoder, PROMPT)
    torch.testing.assert_close(hidden, expected.hidden, atol=1e-5, rtol=0)
    for layer, rows in enumerate(expected.kv):
        torch.testing.assert_close(cache.tensor(layer), rows, atol=1e-5, rtol=0)


def test_a_stage_runs_its_own_layers_only(decoder: Decoder) -> None:
    whole, stage = decoder.new_cache(50), decoder.new_cache(50)
    for at in range(0, len(PROMPT), 13):
        entering = decoder.embed(PROMPT[at : at + 13])
        for layer in range(3):
            entering = decoder.layer(layer, entering, whole, at)
        expected = hidden = entering
        for layer in range(3, 6):
            expected = decoder.layer(layer, expected, whole, at)
            hidden = decoder.layer(layer, hidden, stage, at)
        assert torch.equal(hidden, expected)
    assert all(torch.equal(stage.tensor(layer), whole.tensor(layer)) for layer in range(3, 6))
    assert not any(stage.tensor(layer).any() for layer in (0, 1, 2, 6))


def test_rows_that_landed_ahead_are_not_seen(decoder: Decoder) -> None:
    clean, ahead = decoder.new_cache(60), decoder.new_cache(60)
    for layer in range(decoder.num_layers):
        ahead.block(layer, 26, 60).fill_(float("nan"))
    expected = prefill(decoder, clean, 13, PROMPT[:26])
    assert torch.equal(prefill(decoder, ahead, 13, PROMPT[:26]), expected)
    assert ahead.sha256(26) == clean.sha256(26)
    assert ahead.block(0, 26, 60).isnan().all()


def test_going_back_repeats_the_same_bits(decoder: Decoder) -> None:
    cache = decoder.new_cache(50)
    prefill(decoder, cache, 13)
    digest = cache.sha256(50)
    for at in (26, 39):
        decoder.forward(PROMPT[at : at + 13], cache, at)
    assert cache.sha256(50) == digest


def test_greedy_decode_equals_generate(decoder: Decoder) -> None:
    new_tokens, cache = 30, decoder.new_cache(len(PROMPT) + 30)
    hidden, tokens = prefill(decoder, cache, 13), []
    for position in range(len(PROMPT), len(PROMPT) + new_tokens):
        tokens.append(int(decoder.logits(decoder.norm(hidden[:, -1:])).argmax()))
        hidden = decoder.forward(tokens[-1:], cache, position)
    assert tokens == reference.generate(decoder, PROMPT, new_tokens)
    assert len(set(tokens)) > 3, "a random model that repeats itself proves nothing"


def test_one_decoder_serves_several_threads(decoder: Decoder) -> None:
    digests: list[str] = []

    def work(chunk_size: int) -> None:
        cache = decoder.new_cache(50)
        prefill(decoder, cache, chunk_size)
        digests.append(f"{chunk_size} {cache.sha256(50)}")

    sizes = (13, 7, 13, 7)
    for chunk_size in (13, 7):
        work(chunk_size)
    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(digests) == 6
    assert len(set(digests)) == 2


def test_what_comes_out_may_be_edited_and_carries_no_gradient(llama: Decoder) -> None:
    cache = llama.new_cache(4)
    hidden = llama.layer(0, llama.embed([1, 2, 3]), cache, 0)
    assert not hidden.requires_grad
    assert not hidden.is_inference()
    hidden[0, 0, 0] = 7.0
    cache.block(0, 0, 1).zero_()


def test_attributes_describe_the_model(decoder: Decoder) -> None:
    model = decoder.model
    assert (decoder.num_layers, decoder.hidden_size, decoder.vocab_size) == (7, 64, 128)
    assert (decoder.kv_heads, decoder.head_dim, decoder.max_positions) == (2, 16, 4096)
    assert (decoder.dtype, decoder.device) == (torch.float32, torch.device("cpu"))
    assert decoder.eos_ids == frozenset()
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] == "1"


def test_eos_ids_come_from_the_generation_config_then_the_config(tmp_path: Path) -> None:
    decoder = Decoder.load(tiny_checkpoint(tmp_path, "llama", layers=1, eos_token_id=[5, 9]))
    assert decoder.eos_ids == {5, 9}
    decoder.model.generation_config.eos_token_id = 7
    assert Decoder(decoder.model, decoder.spec).eos_ids == {7}
    decoder.model.generation_config.eos_token_id = None
    assert Decoder(decoder.model, decoder.spec).eos_ids == {5, 9}


def test_dtype_can_be_chosen(folder: Path) -> None:
    assert Decoder.load(folder, dtype="bfloat16").new_cache(1).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="dtype 'int4' is unknown; choose one of auto, float32"):
        Decoder.load(folder, dtype="int4")


def test_missing_weights_are_refused_and_not_made_up(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 weights of a whole model, the first 'model.layers.0.mlp.up_proj.weight'"
    ):
        Decoder.load(folder)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "at least one id"),
        ([[1, 2]], r"one row of at least one id; got shape \(1, 2\)"),
        ([1, 128], "must be 0 to 127; got ids from 1 to 128"),
        ([-1], "must be 0 to 127"),
    ],
)
def test_embed_refuses_ids_out_of_the_vocabulary(llama: Decoder, ids: list[int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        llama.embed(ids)


def test_layer_and_logits_say_what_they_take(llama: Decoder) -> None:
    cache, hidden = llama.new_cache(4), llama.embed(torch.tensor([1, 2, 3]))
    with pytest.raises(ModelError, match="layer 3 is out of range: this model has layers 0 to 2"):
        llama.layer(3, hidden, cache, 0)
    with pytest.raises(ModelError, match=r"takes a hidden state \[1, tokens, 64\]; got \[3, 64\]"):
        llama.layer(0, hidden[0], cache, 0)
    with pytest.raises(ModelError, match="tokens 2 to 5 are out of range: this KV cache holds 4"):
        llama.layer(0, hidden, cache, 2)
    with pytest.raises(ModelError, match=r"one token, \[1, 1, 64\]; got \[1, 3, 64\]"):
        llama.logits(hidden)

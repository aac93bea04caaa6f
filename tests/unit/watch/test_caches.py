"""Rows of transformers' caches, of each class, as real models of random weights fill them in chunks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from dinfer.watch.probe.digests import token_digests
from dinfer.watch.probe.kv_methods import KV_VARIABLE
from dinfer.watch.probe.reading import read
from dinfer.watch.probe.rows import RowsTaken, read_rows
from dinfer.watch.probe.start import Probe

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CHUNKS = (5, 3, 1)
MIXED = ["sliding_attention", "full_attention"] * 2


class OwnUpdate(DynamicCache):
    """Which keeps rows by itself, and calls no parent."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        if layer_idx in self.kept:
            before = self.kept[layer_idx]
            key_states = torch.cat([before[0], key_states], -2)
            value_states = torch.cat([before[1], value_states], -2)
        self.kept[layer_idx] = key_states, value_states
        return self.kept[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kept[layer_idx][0].shape[-2] if layer_idx in self.kept else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0


class OwnLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer class of the user's."""

    def update(self, key_states: Tensor, value_states: Tensor, *given: Any, **options: Any) -> Any:
        return super().update(key_states, value_states, *given, **options)


def own_layers(config: Any) -> Cache:
    make: Callable[[], Any] = OwnLayer
    return Cache(layers=[make() for _ in range(config.num_hidden_layers)])


def dynamic(config: Any) -> Cache:
    return DynamicCache(config=config)


def bare(_: Any) -> Cache:
    return DynamicCache()


def static(config: Any) -> Cache:
    return StaticCache(config=config, max_cache_len=16)


def model_of(name: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = kind(**{**SIZES, **sizes})
    return getattr(transformers, f"{name}ForCausalLM")(config).train(mode=False)


LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Cache], list[int]]] = {
    "dynamic": (lambda: model_of("Qwen3"), dynamic, [0, 1, 2, 3]),
    "dynamic without a config": (lambda: model_of("Llama"), bare, [0, 1, 2, 3]),
    "static": (lambda: model_of("Qwen3"), static, [0, 1, 2, 3]),
    "sliding": (lambda: model_of("Mistral", sliding_window=4), dynamic, [0, 1, 2, 3]),
    "static sliding": (lambda: model_of("Mistral", sliding_window=4), static, [0, 1, 2, 3]),
    "sliding and full": (
        lambda: model_of("Gemma3", sliding_window=4, layer_types=MIXED), dynamic, [0, 1, 2, 3]),
    "static, sliding and full": (
        lambda: model_of("Gemma3", sliding_window=4, layer_types=MIXED), static, [0, 1, 2, 3]),
    "linear and full": (lambda: model_of("Qwen3Next", **LINEAR), dynamic, [1, 3]),
    "own update": (lambda: model_of("Qwen3"), OwnUpdate, [0, 1, 2, 3]),
    "own layers": (lambda: model_of("Qwen3"), own_layers, [0, 1, 2, 3]),
}  # fmt: skip


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[Callable[[], list[RowsTaken]]]:
    """Watches this process; returns what reads the rows."""
    probe = Probe(tmp_path)

    def found() -> list[RowsTaken]:
        (process,) = read(tmp_path)
        assert process.problems == []
        probe._tensors.flush()
        return [one for one in read_rows(tmp_path, process) if one.name == "kv"]

    yield found
    probe.stop()


def spied(cache: Cache) -> list[tuple[int, Tensor, Tensor]]:
    """What a cache is given from now on: layer, K, V."""
    seen = []
    update = cache.update

    def spy(k: Tensor, v: Tensor, layer: int, *given: Any, **options: Any) -> Any:
        seen.append((layer, k.clone(), v.clone()))
        return update(k, v, layer, *given, **options)

    vars(cache)["update"] = spy
    return seen


def fill(model: Any, cache: Cache) -> None:
    begun = 0
    with torch.no_grad():
        for count in CHUNKS:
            model(input_ids=torch.arange(begun, begun + count)[None] % 32, past_key_values=cache)
            begun += count


def assert_rows_are_those(taken: list[RowsTaken], seen: list[tuple[int, Tensor, Tensor]]) -> None:
    """Each update's rows, behind those of the same layer before."""
    lengths: dict[int, int] = {}
    expected = []
    for layer, k, v in seen:
        digests = [(one & (2**64 - 1), other & (2**64 - 1)) for one, other in _digests(k, v)]
        expected.append((layer, lengths.get(layer, 0), digests))
        lengths[layer] = lengths.get(layer, 0) + k.shape[-2]
    assert [(one.layer, one.start, list(one.digests[0])) for one in taken] == expected


def _digests(k: Tensor, v: Tensor) -> list[tuple[int, int]]:
    return list(zip(token_digests(k)[0].tolist(), token_digests(v)[0].tolist(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_row_of_every_layer_is_taken_once(name: str, taken: Callable[[], list[RowsTaken]]) -> None:
    make, make_cache, layers = CASES[name]
    model = make()
    cache = make_cache(model.config)
    seen = spied(cache)
    fill(model, cache)
    assert sorted({layer for layer, _, _ in seen}) == layers
    assert len(seen) == len(CHUNKS) * len(layers)
    assert_rows_are_those(taken(), seen)


def test_a_quantised_cache_is_taken_before_it_is_quantised(taken: Callable[[], list[RowsTaken]]) -> None:
    model = model_of("Qwen3")
    try:
        cache = QuantizedCache("fp8", model.config)
    except ValueError:
        pytest.skip("this transformers quantises no cache without another package")
    seen = spied(cache)
    fill(model, cache)
    assert_rows_are_those(taken(), seen)


def test_a_decoder_s_own_rows_and_its_encoder_s_are_two_caches(taken: Callable[[], list[RowsTaken]]) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    model: Any = transformers.T5ForConditionalGeneration(config)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    seen = [spied(cache.self_attention_cache), spied(cache.cross_attention_cache)]
    with torch.no_grad():
        model(
            input_ids=torch.arange(6)[None],
            decoder_input_ids=torch.arange(3)[None],
            past_key_values=cache,
        )
    rows = taken()
    assert len({one.cache for one in rows}) == 2
    by_cache = [
        [one for one in rows if one.cache == number] for number in sorted({one.cache for one in rows})
    ]
    for mine, its in zip(by_cache, seen, strict=True):
        assert_rows_are_those(mine, its)


def test_a_method_of_a_real_class_that_the_command_line_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states of linear attention are no rows of KV, so they are not taken without being asked for."""
    if "state_idx" not in inspect.signature(LinearAttentionLayer.update_conv_state).parameters:
        pytest.skip("this transformers does not number these states")
    method = "transformers.cache_utils:LinearAttentionLayer.update_conv_state"
    asked = {"method": method, "k": "conv_states", "v": "result", "layer": "7 + state_idx"}
    monkeypatch.setenv(KV_VARIABLE, json.dumps([asked]))
    model = model_of("Qwen3Next", **LINEAR)
    probe = Probe(tmp_path)
    try:
        fill(model, dynamic(model.config))
    finally:
        probe.stop()
    (process,) = read(tmp_path)
    assert process.problems == []
    rows = read_rows(tmp_path, process)
    assert {one.layer for one in rows} == {1, 3, 7}
    assert len([one for one in rows if one.layer == 7]) >= 2 * len(CHUNKS) - 2

"""Masks and rotary embeddings are made once for layers of a kind; the oldest are dropped."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from dinfer.errors import ModelError
from dinfer.model import positions
from dinfer.model.decoder import Decoder
from dinfer.model.positions import KEPT, LayerKind, Positions, layer_kinds

FULL = LayerKind("full_attention", None)


def make(decoder: Decoder) -> tuple[Positions, list[int]]:
    """Return the positions of a decoder and a list that grows with every call of its rotary module."""
    calls: list[int] = []

    def rotary(hidden: torch.Tensor, ids: torch.Tensor) -> Any:
        calls.append(int(ids[0, 0]))
        return decoder.model.get_decoder().rotary_emb(hidden, ids)

    return Positions(decoder.model.config, rotary, rotary_per_layer_type=False), calls


def test_layers_of_a_kind_share_one_placement(llama: Decoder) -> None:
    made, calls = make(llama)
    hidden = torch.zeros(1, 4, 64)
    assert made.of(FULL, 6, hidden) is made.of(FULL, 6, hidden)
    made.of(FULL, 6, hidden[:, :3])
    assert calls == [6, 6]


def test_the_oldest_is_forgotten_first(llama: Decoder) -> None:
    made, calls = make(llama)
    hidden = torch.zeros(1, 1, 64)
    for position in [*range(KEPT), 0, KEPT, 0, 1]:
        made.of(FULL, position, hidden)
    assert calls == [*range(KEPT), KEPT, 1]


def test_masks_are_causal_and_windowed(llama: Decoder) -> None:
    made, _ = make(llama)
    hidden = torch.zeros(1, 2, 64)
    assert made.of(FULL, 0, hidden).mask is None, "SDPA's own causal path, as transformers takes it"
    mask = made.of(FULL, 3, hidden).mask
    assert mask is not None
    assert mask.int().tolist() == [[[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]


def test_unknown_layer_types_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layer_kinds(LlamaConfig(num_hidden_layers=2)) == (FULL, FULL)
    monkeypatch.setattr(positions, "get_layer_types_and_kwargs", lambda _: (["linear_attention"], [{}]))
    with pytest.raises(ModelError, match="'linear_attention' are not supported; supported: full_attention"):
        layer_kinds(SimpleNamespace())

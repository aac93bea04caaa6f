"""The reference is transformers' own answer and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinfer.model import reference
from dinfer.model.decoder import Decoder
from dinfer.model.errors import ModelError
from tests.unit.model.tiny import tiny_checkpoint

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def test_one_chunk_is_the_model_called_once(decoder: Decoder) -> None:
    output = decoder.model(torch.tensor([IDS]), output_hidden_states=True, use_cache=True)
    expected = reference.unchunked(decoder, IDS)
    assert torch.equal(expected.hidden, output.hidden_states[-1])
    assert len(expected.kv) == decoder.num_layers
    for rows, layer in zip(expected.kv, output.past_key_values.layers, strict=True):
        assert rows.shape == (len(IDS), 2, decoder.kv_heads, decoder.head_dim)
        assert torch.equal(rows[:, 0], layer.keys[0].transpose(0, 1))
        assert torch.equal(rows[:, 1], layer.values[0].transpose(0, 1))


def test_the_last_chunk_may_be_short(decoder: Decoder) -> None:
    kv, hidden = reference.chunked_forward(decoder, IDS, 3)
    assert hidden.shape == (1, len(IDS), decoder.hidden_size)
    assert {len(rows) for rows in kv} == {len(IDS)}


@pytest.mark.parametrize(("ids", "chunk_size"), [([], 4), (IDS, 0)])
def test_nothing_to_run_is_refused(llama: Decoder, ids: list[int], chunk_size: int) -> None:
    with pytest.raises(ModelError, match="both must be at least 1"):
        reference.chunked_forward(llama, ids, chunk_size)


def test_generate_stops_at_eos_and_ignores_the_checkpoints_taste(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "plain", "llama")
    free = reference.generate(Decoder.load(path), IDS, 12)
    assert len(free) == 12
    (path / "generation_config.json").write_text(
        f'{{"eos_token_id": [{free[4]}], "repetition_penalty": 50.0, "do_sample": true, "temperature": 9.0}}'
    )
    decoder = Decoder.load(path)
    assert reference.generate(decoder, IDS, 12) == free[: free.index(free[4]) + 1]
    assert decoder.model.generation_config.repetition_penalty == 50.0

"""The reference equals transformers' own forward and generate."""

from pathlib import Path

import pytest
import torch

from dinfer.model.decoder import Decoder
from dinfer.model.reference import Forward
from tests.support import reference
from tests.support.tiny import tiny_checkpoint

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


def test_it_shows_what_it_makes_in_order_and_leaves_no_hook(decoder: Decoder) -> None:
    seen: list[tuple[str, int, torch.Tensor]] = []
    forward = Forward(decoder, lambda *what: seen.append(what))
    output = decoder.model(torch.tensor([IDS]), output_hidden_states=True, logits_to_keep=1)
    modules = [*decoder.model.get_decoder().layers, decoder.model.get_decoder().norm]
    hooks = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in modules]
    fed = forward.feed(IDS)
    layers = decoder.num_layers
    order = [(what, layer) for layer in range(layers) for what in ("hidden", "kv")]
    assert [(what, layer) for what, layer, _ in seen] == [*order, ("hidden", layers)]
    hidden = [tensor for what, _, tensor in seen if what == "hidden"]
    assert all(torch.equal(a, b) for a, b in zip(hidden[:-1], output.hidden_states[:-1], strict=True))
    assert torch.equal(decoder.norm(hidden[-1]), fed.hidden)
    assert torch.equal(fed.logits, output.logits[0, -1])
    assert hooks == [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in modules]


def test_what_looks_may_run_layers_itself(llama: Decoder) -> None:
    seen: list[str] = []

    def see(what: str, layer: int, tensor: torch.Tensor) -> None:
        seen.append(what)
        if what == "hidden" and layer < llama.num_layers:
            llama.layer(layer, tensor, llama.new_cache(len(IDS)), 0)

    assert torch.equal(Forward(llama, see).feed(IDS).hidden, reference.unchunked(llama, IDS).hidden)
    assert len(seen) == 2 * llama.num_layers + 1


def test_what_looks_may_end_it(llama: Decoder) -> None:
    def see(what: str, layer: int, tensor: torch.Tensor) -> None:
        raise RuntimeError(f"{what} {layer} {list(tensor.shape)}")

    with pytest.raises(RuntimeError, match=r"hidden 0 \[1, 8, 64\]"):
        Forward(llama, see).feed(IDS)
    assert not any(module._forward_pre_hooks for module in llama.model.get_decoder().layers)


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

"""Checks of runs by graphs, on any device. Not a test."""

from __future__ import annotations

import random
from typing import Any

import torch

from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.model.decoder import Decoder
from dinfer.model.tolerance import tolerance
from dinfer.run.stepper import Stepper
from tests.support.twin import Twin, prompt, twin

IDS = list(prompt(45))
CHUNK, NEW = 16, 8  # the last chunk is shorter


def alone(decoder: Decoder, **config: Any) -> tuple[list[torch.Tensor], list[int]]:
    """KV of each layer, and new tokens, of one rank that runs transformers' own kernels."""
    with twin(decoder, world_size=1, chunk_size=CHUNK, max_new_tokens=NEW, **config) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        tokens = made.all(lambda engine: engine.decode_phase())[0]
        return _kv(made), tokens


def _kv(made: Twin, rank: int = 0) -> list[torch.Tensor]:
    cache = made.engines[rank].cache
    assert cache
    return [cache.block(layer, 0, len(IDS)).clone() for layer in range(cache.layers)]


def check_a_run(decoder: Decoder, **config: Any) -> None:
    """A run by graphs: the same KV on all ranks, with right digests, within the tolerance of transformers' own kernels;
    and the same new tokens, if these are float32, where there are no near-ties."""
    exact, tokens = alone(decoder)
    with twin(decoder, chunk_size=CHUNK, max_new_tokens=NEW, graphs=True, **config) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        made.all(lambda engine: engine.recheck())
        kv = [_kv(made, rank) for rank in range(len(made.engines))]
        for engine in made.engines:
            state = engine.executor.state
            assert len(state.ledger.entries) == 3 * decoder.num_layers
            for key, entry in state.ledger.entries.items():
                rows = row_digests(state.block(*key))
                assert torch.equal(entry.rows, rows)
                assert as_numbers(entry.digests) == as_numbers(block_digests(rows))
        found = made.all(lambda engine: engine.decode_phase())
    assert all(torch.equal(one, other) for ranks in kv for one, other in zip(ranks, kv[0], strict=True))
    assert all(one == found[0] for one in found)
    dtype = str(decoder.dtype).removeprefix("torch.")
    for layer, (one, other) in enumerate(zip(kv[0], exact, strict=True)):
        share = float((one - other).abs().max() / other.abs().max())
        assert share <= tolerance(dtype, dtype, layer, 128), f"layer {layer}: {share}"
    if decoder.dtype == torch.float32:
        assert found[0] == tokens


def check_a_walk(decoder: Decoder, seed: int, **config: Any) -> None:
    """Steps, backs and jumps in any order, then on to the end: the same bits as a run without them."""
    drawn = random.Random(seed)
    with twin(decoder, chunk_size=CHUNK, max_new_tokens=NEW, graphs=True, **config) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        whole, tokens = _kv(made, 1), made.all(lambda engine: engine.decode_phase())
        stepper = Stepper(made.prepare(IDS))
        for _ in range(30):
            unit: Any = drawn.choice(("op", "layer", "wave", "chunk"))
            if drawn.random() < 0.4:
                stepper.step_back(unit, drawn.randint(1, 3))
            elif drawn.random() < 0.2:
                stepper.run_to(drawn.randrange(3), drawn.randrange(decoder.num_layers))
            else:
                stepper.step(unit, drawn.randint(1, 2))
        made.all(lambda engine: engine.prefill_phase())
        assert all(torch.equal(one, other) for one, other in zip(_kv(made, 1), whole, strict=True))
        made.all(lambda engine: engine.recheck())
        assert made.all(lambda engine: engine.decode_phase()) == tokens

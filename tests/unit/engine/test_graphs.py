"""Runs by graphs, as far as that needs no GPU: on a CPU a "graph" is the function that would be captured."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from dinfer.config import Config, ConfigError
from dinfer.engine.kernels import Kernels
from dinfer.model.decoder import Decoder
from dinfer.model.kernels.graphs import LayerGraphs
from dinfer.plan.faults import Fault
from dinfer.run.stepper import Stepper
from tests.support.graph_runs import CHUNK, IDS, NEW, alone, check_a_run, check_a_walk
from tests.support.tiny import CONFIGS, tiny_checkpoint
from tests.support.twin import LocalFleet, twin

WINDOWED = {"gemma2", "gemma3_text", "mistral"}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder.load(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), layers=6), mapped=False)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_each_family_computes_what_transformers_does(tmp_path: Path, family: str) -> None:
    window: dict[str, Any] = {"sliding_window": 8} if family in WINDOWED else {}
    decoder = Decoder.load(tiny_checkpoint(tmp_path, family, layers=4, **window), mapped=False)
    check_a_run(decoder, world_size=1)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_ranks_hold_the_same(decoder: Decoder, backend: str, strategy: str) -> None:
    check_a_run(decoder, world_size=3, backend=backend, sync_strategy=strategy)


def test_lockstep(decoder: Decoder) -> None:
    check_a_run(decoder, world_size=2, schedule="lockstep")


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("seed", range(3))
def test_a_walk_ends_as_a_run_without_it(decoder: Decoder, backend: str, seed: int) -> None:
    check_a_walk(decoder, seed, world_size=2, backend=backend)


def test_joined_weights_leave_the_decoders_own_forward_as_it_was(tmp_path: Path) -> None:
    before = Decoder.load(tiny_checkpoint(tmp_path), mapped=False)
    joined = Decoder.load(tmp_path, mapped=False)
    LayerGraphs(joined, "graph")
    one, other = (each.forward(IDS, each.new_cache(64), 0) for each in (before, joined))
    assert torch.equal(one, other)
    weight = joined.base.layers[0].self_attn
    assert (
        weight.q_proj.weight.untyped_storage().data_ptr() == weight.v_proj.weight.untyped_storage().data_ptr()
    )


@pytest.mark.parametrize("where", ["compute", "memory"])
def test_a_fault_is_found_where_it_struck(decoder: Decoder, where: str) -> None:
    with twin(decoder, world_size=1, chunk_size=CHUNK, graphs=True) as made:
        engine = made.engines[0]
        engine.prepare(IDS)
        state = engine.executor.state
        fault = Fault(1, "bitflip", where, rank=0, chunk=1, layer=3, tensor="K", head=0, token=CHUNK)
        struck: list[int] = []
        state.faults.arm([fault], lambda strike: struck.append(strike.changed))
        engine.prefill_phase()
        assert struck == [1]
        changed = [(one.chunk, one.layer) for one in state.changed_blocks()]
        assert changed == (
            [] if where == "compute" else [(1, 3)]
        )  # computed wrong: its digests are of what is there


def test_a_hidden_state_by_hand_is_what_the_next_layer_takes(decoder: Decoder) -> None:
    found = {}
    for graphs in (True, False):
        with twin(decoder, world_size=1, chunk_size=CHUNK, graphs=graphs) as made:
            engine = made.engines[0]
            engine.prepare(IDS)
            engine.step("layer", 60)
            engine.hidden[0, 1].mul_(2)
            assert "hidden c0 l1" in str(engine.step("layer", 60))
            engine.prefill_phase()
            found[graphs] = engine.kv(5).k.clone()
    torch.testing.assert_close(found[True], found[False], rtol=1e-3, atol=1e-4)
    with twin(decoder, world_size=1, chunk_size=CHUNK) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        assert not torch.allclose(made.engines[0].kv(5).k, found[True], rtol=1e-3)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3}])
def test_tokens_made_ahead_are_those_made_one_by_one(decoder: Decoder, sampling: dict[str, Any]) -> None:
    _, wanted = alone(decoder, **sampling)
    settings: dict[str, Any] = {"chunk_size": CHUNK, "max_new_tokens": NEW, **sampling}
    with twin(decoder, world_size=2, graphs=True, **settings) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        decodings = [engine.decoding() for engine in made.engines]
        by_rank = dict(zip(map(id, made.engines), decodings, strict=True))
        made.all(lambda engine: [by_rank[id(engine)].step() for _ in range(5)])
        for one in decodings:
            one.back_to(2)
        made.all(lambda engine: list(by_rank[id(engine)].run(NEW)))
        assert [one.tokens for one in decodings] == [wanted, wanted]


def test_a_repeated_row_is_decoded_by_the_decoders_own_forward(decoder: Decoder) -> None:
    with twin(decoder, world_size=1, chunk_size=CHUNK, max_new_tokens=NEW, graphs=True) as made:
        engine = made.engines[0]
        engine.prefill_phase(IDS)
        struck: list[str] = []
        engine.executor.state.faults.arm(
            [Fault(1, "repeat_row", "memory")], lambda strike: struck.append(strike.found)
        )
        assert len(engine.decode_phase()) == NEW
        assert struck


def test_where_there_is_no_gpu_auto_is_exact_and_graphs_are_refused(decoder: Decoder) -> None:
    assert Kernels().prepare(decoder, Config(world_size=1)) is None
    with pytest.raises(ConfigError, match=r"kernels is graph.*needs a GPU.*gpu_ids"):
        Config(kernels="graph")


def test_going_back_after_decode_begins_where_prefill_was(decoder: Decoder) -> None:
    with twin(decoder, world_size=1, chunk_size=CHUNK, max_new_tokens=NEW, graphs=True) as made:
        engine = made.engines[0]
        engine.prefill_phase(IDS)
        final, tokens = engine.executor.state.final, engine.decode_phase()
        assert final is not None
        stepper = Stepper(LocalFleet(made.exchange, made.engines))
        for _ in range(2):
            stepper.step_back("op")  # before the norm: the last hidden state is computed anew
            engine.prefill_phase()
            again = engine.executor.state.final
            assert again is not None
            assert torch.equal(again, final)
            assert engine.decode_phase() == tokens


def test_two_decodes_of_one_rank_take_turns(decoder: Decoder) -> None:
    with twin(decoder, world_size=1, chunk_size=CHUNK, max_new_tokens=NEW, graphs=True) as made:
        engine = made.engines[0]
        engine.prefill_phase(IDS)
        one, other = engine.decoding(), engine.decoding()
        for _ in zip(one.run(NEW), other.run(NEW), strict=True):
            pass
        assert one.tokens == other.tokens == alone(decoder)[1]


def test_the_graphs_of_other_lengths_change_nothing(decoder: Decoder) -> None:
    """Which chunk sizes a session had before must not decide how a shorter last chunk is rounded."""
    kernels, lengths = Kernels(), []
    for size in (8, 32):
        config = Config(world_size=1, chunk_size=size)
        graphs = kernels.capture("graph", decoder, config)
        lengths.append((graphs.layers.holds(8, 100), graphs.layers.holds(9, 100)))
    assert lengths == [(True, False), (True, True)]
    assert graphs.layers.lengths == [8, 32]
    graphs.layers.begin(5, 0)
    assert graphs.layers._length is graphs.layers._lengths[32]


def test_a_prompt_leaves_no_cache_in_the_table(decoder: Decoder) -> None:
    with twin(decoder, world_size=1, chunk_size=CHUNK, graphs=True) as made:
        engine = made.engines[0]
        engine.prefill_phase(IDS)
        left = weakref.ref(engine.cache)
        assert engine.release()
        gc.collect()
        assert left() is None

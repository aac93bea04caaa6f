"""The names that a user calls on a rank: each is of use on its own, and a wrong call gets one clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dinfer.engine.engine import KV, Engine
from dinfer.errors import ModelError
from dinfer.model.decoder import Decoder
from dinfer.plan.ops import PlanError
from tests.support.expected import NEW_TOKENS, expected, is_complete, same_kv
from tests.support.twin import Twin, prompt, twin

CHUNK = 4
IDS = list(prompt(10))


def test_a_layer_alone_needs_no_other_rank(small: Decoder) -> None:
    wanted = expected(small, IDS, CHUNK)
    with twin(small, world_size=3, chunk_size=CHUNK) as made:
        engine = made.engines[1]
        cache = small.new_cache(len(IDS))
        for start in range(0, len(IDS), CHUNK):
            hidden = small.embed(IDS[start : start + CHUNK])
            for layer in range(small.num_layers):
                got = engine.forward_single_layer(layer, hidden, position=start, cache=cache)
                assert (got["layer_idx"], got["position"]) == (layer, start)
                k, v = got["kv_cache"]
                rows = wanted.kv[layer][start : start + CHUNK]
                assert torch.equal(k[0].transpose(0, 1), rows[:, 0])
                assert torch.equal(v[0].transpose(0, 1), rows[:, 1])
                hidden = got["hidden_states"]


def test_a_layer_alone_takes_the_current_chunk_of_the_prompt(small: Decoder) -> None:
    wanted = expected(small, IDS, CHUNK)
    with twin(small, world_size=1, chunk_size=CHUNK) as made:
        engine = made.engines[0]
        engine.prefill_phase(IDS)
        engine.chunk = 2
        got = engine.forward_single_layer(0, small.embed(IDS[8:]))
        assert got["position"] == 8
        assert torch.equal(got["kv_cache"][0][0].transpose(0, 1), wanted.kv[0][8:, 0])
        assert same_kv(engine, wanted.kv)


def test_a_layer_alone_without_a_prompt_makes_its_own_cache(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        got = made.engines[1].forward_single_layer(0, small.embed(IDS[:4]))
        assert got["hidden_states"].shape == (1, 4, small.hidden_size)
        with pytest.raises(ModelError, match="layer 3 is out of range"):
            made.engines[1].forward_single_layer(3, small.embed(IDS[:4]))


def sync(made: Twin, layer: int, pairs: dict[int, KV | None]) -> list[KV]:
    return made.all(lambda engine: engine.sync_single_layer_cache(layer, pairs.get(engine.rank)))


def pair(decoder: Decoder, tokens: int = 4) -> KV:
    generator = torch.Generator().manual_seed(tokens)
    shape = (1, decoder.kv_heads, tokens, decoder.head_dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_single_sync_gives_every_rank_the_owners_pair(small: Decoder, strategy: str, layer: int) -> None:
    k, v = pair(small)
    with twin(small, world_size=3, chunk_size=CHUNK, sync_strategy=strategy) as made:
        for got_k, got_v in sync(made, layer, {layer: (k, v)}):
            assert torch.equal(got_k, k)
            assert torch.equal(got_v, v)


def test_a_single_sync_writes_into_the_prompts_cache(small: Decoder) -> None:
    k, v = pair(small)
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        made.prepare(IDS)
        for engine in made.engines:
            engine.chunk = 1
        sync(made, 2, {1: (k, v)})
        for engine in made.engines:
            assert engine.cache is not None
            assert torch.equal(engine.cache.k(2, 8, 4), k)
            assert torch.equal(engine.cache.v(2, 8, 4), v)
            assert not engine.cache.block(2, 0, 4).any()


@pytest.mark.parametrize(
    ("layer", "given", "complaint"),
    [
        (0, (), r"rank 0 owns layer 0: .* passed on ranks \[\]"),
        (0, (0, 1), r"rank 0 owns layer 0: .* passed on ranks \[0, 1\]"),
        (2, (0,), r"rank 1 owns layer 2: .* passed on ranks \[0\]"),
        (3, (0,), "there is no layer 3: the layers are 0 to 2"),
        (-1, (1,), "there is no layer -1"),
    ],
)
def test_a_wrong_single_sync_gets_the_same_error_on_every_rank(
    small: Decoder, layer: int, given: tuple[int, ...], complaint: str
) -> None:
    def call(engine: Engine) -> str:
        with pytest.raises(ValueError, match=complaint) as caught:
            engine.sync_single_layer_cache(layer, pair(small) if engine.rank in given else None)
        return str(caught.value)

    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        assert len(set(made.all(call))) == 1
        sync(made, 0, {0: pair(small)})  # and the ranks can go on


def test_a_pair_in_another_form_is_refused_before_it_is_sent(small: Decoder) -> None:
    k, v = pair(small)
    for wrong in ((k, v[:, :, :2]), (k[0], v[0]), (k.double(), v.double())):
        with (
            twin(small, world_size=2, chunk_size=CHUNK) as made,
            pytest.raises(ValueError, match="in another shape or dtype"),
        ):
            sync(made, 0, {0: wrong})


def test_ranks_that_sync_different_blocks_are_told(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        made.engines[1].chunk = 1
        with pytest.raises(ValueError, match="rank 0: c0 l0; rank 1: c1 l0"):
            sync(made, 0, {0: pair(small)})


def test_a_single_sync_is_refused_while_lanes_run(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        fleet = made.prepare(IDS)
        made.engines[1].executor.set_limits([len(lane.ops) for lane in fleet.plan.lanes[1]])
        with pytest.raises(ValueError, match=r"lanes run on ranks \[1\]"):
            sync(made, 0, {0: pair(small)})


def test_a_prompt_may_be_text(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK, max_new_tokens=3) as made:
        made.all(lambda engine: engine.prefill_phase("héllo"))
        assert len(made.engines[0].ids) == len("héllo".encode())
        tokens = made.all(lambda engine: engine.decode_phase())
        assert tokens[0] == tokens[1]


def test_decode_goes_on_from_the_prefill_of_another_engine(small: Decoder) -> None:
    wanted = expected(small, IDS, CHUNK)
    other = list(prompt(7, seed=5))
    with twin(small, world_size=2, chunk_size=CHUNK, max_new_tokens=NEW_TOKENS) as one:
        results = one.all(lambda engine: engine.prefill_phase(IDS))
        with twin(small, world_size=2, chunk_size=CHUNK, max_new_tokens=NEW_TOKENS) as two:
            two.all(lambda engine: engine.prefill_phase(other))
            tokens = two.all(lambda engine: engine.decode_phase(*results[1 - engine.rank]))
            assert tokens == [wanted.tokens] * 2
            assert two.all(lambda engine: engine.decode_phase()) == [expected(small, other, CHUNK).tokens] * 2
        with twin(small, world_size=1, chunk_size=CHUNK, max_new_tokens=NEW_TOKENS) as fresh:
            assert fresh.engines[0].decode_phase(*results[0]) == wanted.tokens


def test_decode_may_be_repeated_and_go_further_than_was_planned(small: Decoder) -> None:
    wanted = expected(small, IDS, CHUNK)
    with twin(small, world_size=2, chunk_size=CHUNK, max_new_tokens=2) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        assert made.all(lambda engine: engine.decode_phase()) == [wanted.tokens[:2]] * 2
        longer = made.all(lambda engine: engine.decode_phase(max_new_tokens=NEW_TOKENS))
        assert longer == [wanted.tokens] * 2
        assert is_complete(made, wanted)


def test_decode_ends_with_the_models_positions(small: Decoder) -> None:
    ids = list(prompt(small.max_positions - 2))
    with twin(small, world_size=2, chunk_size=32, max_new_tokens=NEW_TOKENS) as made:
        made.all(lambda engine: engine.prefill_phase(ids))
        tokens = made.all(lambda engine: engine.decode_phase())
        assert tokens == [expected(small, ids, 32).tokens[:3]] * 2


def test_tokens_are_told_as_they_come(small: Decoder) -> None:
    told: list[int] = []
    with twin(small, world_size=1, chunk_size=CHUNK, max_new_tokens=NEW_TOKENS) as made:
        made.engines[0].prefill_phase(IDS)
        assert made.engines[0].decode_phase(on_token=told.append) == told
        assert (made.engines[0].board.phase, made.engines[0].board.decoded) == ("decode", len(told))


def test_kv_caches_of_another_model_are_refused(small: Decoder) -> None:
    with twin(small, world_size=1, chunk_size=CHUNK) as made:
        hidden, kv = made.engines[0].prefill_phase(IDS)
        with pytest.raises(ModelError, match="kv_caches has 2 layers; this model has 3"):
            made.engines[0].decode_phase(hidden, kv[:2])


@pytest.mark.parametrize("call", [Engine.prefill_phase, Engine.decode_phase])
def test_a_call_before_there_is_a_prompt_says_what_to_do(small: Decoder, call: object) -> None:
    assert callable(call)
    with twin(small, world_size=1) as made, pytest.raises(RuntimeError, match="no prompt yet: call prefill"):
        call(made.engines[0])


def test_decode_waits_for_the_prefill_to_be_complete(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        made.prepare(IDS)
        with pytest.raises(RuntimeError, match="no finished prefill"):
            made.engines[0].decode_phase()


def test_sampling_draws_the_same_tokens_on_every_rank_and_again(small: Decoder) -> None:
    drawn: dict[int, list[int]] = {}
    sampling: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "max_new_tokens": 12}
    for seed in (0, 0, 1):
        with twin(small, world_size=3, chunk_size=CHUNK, seed=seed, **sampling) as made:
            made.all(lambda engine: engine.prefill_phase(IDS))
            tokens = made.all(lambda engine: engine.decode_phase())
            assert tokens == [tokens[0]] * 3
            assert drawn.setdefault(seed, tokens[0]) == tokens[0]
    assert drawn[0] != drawn[1]


def test_an_empty_prompt_and_one_too_long_are_refused(small: Decoder) -> None:
    with twin(small, world_size=2) as made:
        with pytest.raises(PlanError, match="tokens is 0"):
            made.engines[0].prefill_phase([])
        with pytest.raises(ModelError, match="65 tokens; this model has 64 positions"):
            made.engines[0].prefill_phase(prompt(65))

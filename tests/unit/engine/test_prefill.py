"""Prefill on several ranks is transformers' own chunked forward, bit for bit, on every rank."""

import threading
from itertools import product

import pytest
import torch

from dinfer.model.decoder import Decoder
from dinfer.transport.gate import Gate
from tests.support.expected import NEW_TOKENS, Expected, expected, is_complete, lane_threads, same_kv
from tests.support.seeded_gate import SeededGate
from tests.support.twin import Twin, prompt, twin

CHUNK = 13
IDS = prompt(50)
MATRIX = list(product(("qwen3", "llama"), ("pairwise", "ring"), ("pipelined", "lockstep"), (1, 2, 3, 5)))


def check(made: Twin, ids: list[int], wanted: Expected, *, decode: bool = True) -> None:
    results = made.all(lambda engine: engine.prefill_phase(ids))
    assert is_complete(made, wanted)
    for result in results:
        assert torch.equal(result.hidden_states, wanted.final)
        for (k, v), rows, whole in zip(result.kv_caches, wanted.kv, wanted.unchunked, strict=True):
            assert torch.equal(k[0].transpose(0, 1), rows[:, 0])
            assert torch.equal(v[0].transpose(0, 1), rows[:, 1])
            torch.testing.assert_close(rows, whole, rtol=0, atol=1e-5)
    if decode:
        assert made.all(lambda engine: engine.decode_phase()) == [wanted.tokens] * len(made.engines)


def prefill(
    decoder: Decoder,
    *,
    gate: Gate | None = None,
    rendezvous: bool = True,
    decode: bool = True,
    **config: object,
) -> None:
    with twin(
        decoder, gate=gate, rendezvous=rendezvous, chunk_size=CHUNK, max_new_tokens=NEW_TOKENS, **config
    ) as made:
        check(made, list(IDS), expected(decoder, IDS, CHUNK), decode=decode)


@pytest.mark.parametrize(("family", "strategy", "schedule", "world_size"), MATRIX)
def test_every_rank_ends_with_the_reference(
    decoders: dict[str, Decoder], family: str, strategy: str, schedule: str, world_size: int
) -> None:
    config = {"world_size": world_size, "schedule": schedule, "sync_strategy": strategy}
    seed = MATRIX.index((family, strategy, schedule, world_size))
    gates: list[tuple[Gate, bool]] = [(Gate(), True), (SeededGate(seed), False)]
    if (seed + seed // 4) % 2:  # every world size meets both pairs, and so does every schedule
        gates = [(SeededGate(seed), True), (Gate(), False)]
    for gate, rendezvous in gates:
        decode = rendezvous is not isinstance(gate, SeededGate)
        prefill(decoders[family], gate=gate, rendezvous=rendezvous, decode=decode, **config)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "strategy", "schedule", "world_size"), MATRIX)
def test_every_interleaving_ends_with_the_reference(
    decoders: dict[str, Decoder], family: str, strategy: str, schedule: str, world_size: int
) -> None:
    config = {"world_size": world_size, "schedule": schedule, "sync_strategy": strategy}
    for seed in range(20):
        prefill(decoders[family], gate=SeededGate(seed), rendezvous=bool(seed % 2), decode=False, **config)


@pytest.mark.parametrize("layer_split", ["1,2", "5,6", "1,6"])
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
def test_stages_may_be_uneven(decoders: dict[str, Decoder], layer_split: str, schedule: str) -> None:
    prefill(decoders["llama"], world_size=3, layer_split=layer_split, schedule=schedule)


@pytest.mark.parametrize("tokens", [1, 5, 13, 14, 26])
def test_any_length_of_prompt_fits_the_chunks(small: Decoder, tokens: int) -> None:
    ids = list(prompt(tokens))
    with twin(small, world_size=3, chunk_size=CHUNK, max_new_tokens=NEW_TOKENS) as made:
        check(made, ids, expected(small, ids, CHUNK))


def test_two_prompts_one_after_another(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=4, max_new_tokens=NEW_TOKENS) as made:
        for tokens in (9, 23, 3):
            ids = list(prompt(tokens, seed=tokens))
            check(made, ids, expected(small, ids, 4))


def test_a_refused_prompt_leaves_the_one_before_it(small: Decoder) -> None:
    ids = list(prompt(9))
    with twin(small, world_size=2, chunk_size=4, max_new_tokens=NEW_TOKENS) as made:
        check(made, ids, expected(small, ids, 4))
        with pytest.raises(ValueError, match="positions"):
            made.engines[0].prepare(prompt(65))
        assert all(same_kv(engine, expected(small, ids, 4).kv) for engine in made.engines)
        assert made.all(lambda engine: engine.decode_phase()) == [expected(small, ids, 4).tokens] * 2


def test_batched_finishes_where_sends_are_buffered(small: Decoder) -> None:
    ids = list(prompt(9))
    with twin(
        small,
        rendezvous=False,
        world_size=3,
        chunk_size=4,
        schedule="batched",
        unsafe=True,
        max_new_tokens=NEW_TOKENS,
    ) as made:
        check(made, ids, expected(small, ids, 4))


def test_every_lane_asks_for_torchs_thread_count_first(
    small: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its first matrix products may run on all cores, with other last bits."""
    asked, count = list[str](), torch.get_num_threads

    def get_num_threads() -> int:
        asked.append(threading.current_thread().name)
        return count()

    monkeypatch.setattr(torch, "get_num_threads", get_num_threads)
    for backend in ("gloo", "nccl"):
        asked.clear()
        with twin(small, world_size=2, chunk_size=4, backend=backend) as made:
            made.prepare(list(prompt(10)))
            lanes = lane_threads()
            made.all(lambda engine: engine.prefill_phase())
        assert lanes
        assert set(lanes) <= set(asked)

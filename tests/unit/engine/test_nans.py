"""NaN or Inf in the logits: the message names the first layer and chunk that has one, and on which ranks."""

from collections.abc import Callable

import pytest
import torch

from dinfer.engine.decoding import NOWHERE, NanOrigin, NotANumber, first_nan
from dinfer.engine.engine import Engine
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.plan.partition import partition
from tests.support.twin import Twin, prompt, twin

IDS = prompt(10)
CHUNK = 4


def told(made: Twin, spoil: Callable[[Engine], None]) -> NotANumber:
    """What decode raises once `spoil` has been at every rank."""
    made.all(lambda engine: engine.prefill_phase(IDS))
    for engine in made.engines:
        spoil(engine)
    with pytest.raises(NotANumber) as caught:
        made.all(lambda engine: engine.decode_phase())
    return caught.value


def put_nan(engine: Engine, layer: int, token: int) -> None:
    """One number of one K."""
    assert engine.cache is not None
    engine.cache.tensor(layer)[token, 0, 1, 3] = float("nan")


def test_a_block_that_is_nan_on_one_rank_only_has_changed_there(small: Decoder) -> None:
    with twin(small, world_size=3, chunk_size=CHUNK) as made:
        error = told(made, lambda engine: put_nan(engine, 1, 5) if engine.rank == 2 else None)
    assert (error.position, error.places) == (1, {2: NanOrigin(5, 1)})
    assert str(error) == (
        "the logits of new token 1 are not finite (NaN or Inf) on rank 2. The first NaN or Inf is in layer 1, chunk 1 "
        "(token 5) of the KV on rank 2: rank 1 computed that block without any, so it changed on the way or in memory."
    )


def test_a_layer_that_makes_nan_is_named_with_its_rank_and_chunk(
    small: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 1 spoils its output for chunk 1, so the first NaN in any KV is layer 2's."""
    layer = Decoder.layer

    def spoilt(
        self: Decoder, index: int, hidden: torch.Tensor, cache: KVCache, position: int
    ) -> torch.Tensor:
        output = layer(self, index, hidden, cache, position)
        if (index, position) == (1, CHUNK):
            output[0, 2] = float("nan")
        return output

    monkeypatch.setattr(Decoder, "layer", spoilt)
    with twin(small, world_size=3, chunk_size=CHUNK) as made:
        error = told(made, lambda _: None)
    # Though blocks are on their way when the first token is chosen:
    with twin(small, world_size=3, chunk_size=CHUNK) as made, pytest.raises(NotANumber) as early:
        made.all(lambda engine: engine.generate_phase(IDS))
    assert early.value.places == error.places
    assert error.places == dict.fromkeys(range(3), NanOrigin(CHUNK + 2, 2))
    assert (
        "NaN or Inf) on all ranks. The first NaN or Inf is in layer 2, chunk 1 (token 6) of the KV on all ranks: "
        in str(error)
    )
    assert "computed by rank 2; it arose in that layer's K and V or in layer 1 after its KV; " in str(error)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_inf_in_the_logits_is_one_too_and_minus_inf_is_none(
    small: Decoder, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    logits = Decoder.logits

    def spoilt(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        found = logits(self, hidden)
        found[3] = -float("inf")
        return found

    monkeypatch.setattr(Decoder, "logits", spoilt)
    with twin(small, world_size=1, chunk_size=CHUNK) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        assert made.all(lambda engine: engine.decode_phase())[0]
    monkeypatch.setattr(Decoder, "logits", lambda self, _: torch.full((self.spec.vocab_size,), value))
    with twin(small, world_size=1, chunk_size=CHUNK) as made:
        assert told(made, lambda _: None).places == {0: NOWHERE}


def test_without_nan_in_the_kv_the_end_of_the_model_is_named(
    small: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "logits", lambda self, _: torch.full((self.spec.vocab_size,), float("nan")))
    with twin(small, world_size=1, chunk_size=CHUNK) as made:
        error = told(made, lambda _: None)
    assert error.places == {0: NOWHERE}
    assert (
        "There is no NaN or Inf in any row of the KV on rank 0: it arose after the KV of the last layer"
        in str(error)
    )


def test_of_several_the_first_chunk_counts_then_the_first_layer() -> None:
    """Within a chunk NaN reaches earlier tokens; a new token is a chunk of its own."""
    cache = KVCache(layers=3, capacity=12, kv_heads=1, head_dim=2, dtype=torch.float16, device="cpu")
    shape = partition(layers=3, tokens=8, world_size=1, chunk_size=4)
    assert first_nan(cache, 12, shape) == NOWHERE
    for token, layer in ((5, 2), (7, 1), (9, 2), (10, 0)):
        cache.tensor(layer)[token, 1] = float("nan")
    assert first_nan(cache, 12, shape) == NanOrigin(7, 1)
    assert first_nan(cache, 12, None) == NanOrigin(10, 0)
    assert first_nan(cache, 5, shape) == NOWHERE
    cache.tensor(1)[7] = cache.tensor(2)[5] = 0.0
    assert first_nan(cache, 12, shape) == NanOrigin(9, 2)

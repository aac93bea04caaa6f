"""What a rank answers when it is to compare what it holds with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from dinfer.engine.engine import Engine
from dinfer.engine.prefill import Prefill
from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.kv.reference.reports import Examined
from dinfer.messages import (
    Comparing,
    DigestHidden,
    ReferenceReport,
    Reply,
    RunReference,
    StopReference,
    pack_report,
    unpack_report,
)
from dinfer.model.decoder import Decoder
from dinfer.rank.decode import PromptOnRank, Tokens
from dinfer.rank.inventory import Inventory
from dinfer.rank.reference import LayerReplay, References, Stopped
from tests.support.twin import Twin, prompt, twin

IDS = list(prompt(10))
REQUEST = RunReference(chunked=True, dtype="float32", chunks=3)


@pytest.fixture
def made(small: Decoder) -> Iterator[Twin]:
    """Two ranks at the end of prefill: 3 layers, 3 chunks of 4 tokens."""
    with twin(small, world_size=2, chunk_size=4, max_new_tokens=4) as found:
        found.all(lambda engine: engine.prefill_phase(IDS))
        yield found


def references_of(
    engine: Engine, tokens: Tokens | None = None, tell: Callable[[Comparing], None] = lambda _: None
) -> References:
    return References(lambda: PromptOnRank(engine, tokens or Tokens(engine)), tell)


def digests(engine: Engine, spans: Sequence[range]) -> tuple[tuple[int, int, tuple[int, int]], ...]:
    """Of what is in the cache, by chunk and layer."""
    cache, found = engine.executor.state.cache, []
    for layer in range(3):
        for chunk, span in enumerate(spans):
            rows = row_digests(cache.block(layer, span.start, span.stop))
            found.append((chunk, layer, as_numbers(block_digests(rows))))
    return tuple(found)


def test_how_far_it_is_is_told(made: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinfer.rank.reference.TELL_S", -1)
    told = list[Comparing]()
    references_of(made.engines[0], tell=told.append).run(REQUEST)
    assert {one.total for one in told} == {len(IDS)}
    assert [one.done for one in told] == sorted(one.done for one in told)
    assert (told[0].done, told[-1].done) == (0, len(IDS))


def test_which_hidden_states_are_held(made: Twin) -> None:
    found = references_of(made.engines[1]).hidden(DigestHidden())
    stage = made.engines[1].executor.plan.shape.starts[1]
    assert found.tokens == ()
    assert [key[:2] for key in found.digests] == [(0, stage), (1, stage), (2, stage), (2, 4)]


def test_digests_are_the_references(made: Twin) -> None:
    for engine in made.engines:
        references = references_of(engine)
        held, found = references.hidden(DigestHidden()), references.run(REQUEST)
        came = unpack_report(pack_report(Reply(1, found)))
        assert isinstance(came, Reply)
        assert isinstance(came.answer, ReferenceReport)
        assert replace(Examined.of(0, came.answer), report=found) == Examined.of(0, found)
        assert found.blocks == digests(engine, engine.executor.plan.shape.chunks)
        assert set(held.digests) <= set(found.hidden)
        assert (found.exact, found.rows, found.threads, found.device) == (True, 10, 1, "cpu")
        assert all(its.changed == 0 for its in Examined.of(0, found).measured.values())
        assert len(found.measured) == 3 * 3 * 2 + 3 * 4 + 1
        assert (found.misplaced, found.choices) == ((), ())


def test_new_tokens_are_one_more_block(made: Twin) -> None:
    all_tokens = [Tokens(engine) for engine in made.engines]
    for one in all_tokens:
        one.limit_to(4)
    made.all(lambda engine: all_tokens[engine.rank].run(lambda *_: None))
    references = references_of(made.engines[0], all_tokens[0])
    found = references.run(REQUEST)
    assert found.rows == 13
    spans = (*made.engines[0].executor.plan.shape.chunks, range(10, 13))
    assert found.blocks == digests(made.engines[0], spans)
    assert found.choices == ()


def test_a_replay_is_what_the_run_had_and_leaves_its_kv_alone(made: Twin, small: Decoder) -> None:
    engine = made.engines[1]
    state: Prefill = engine.executor.state
    before = [state.cache.tensor(layer).clone() for layer in range(3)]
    versions = [state.cache.tensor(layer)._version for layer in range(3)]
    replay, cache = LayerReplay(small, Inventory(PromptOnRank(engine, Tokens(engine)))), small.new_cache(10)
    for chunk, rows in enumerate(state.plan.shape.chunks):
        hidden = small.embed(IDS[rows.start : rows.stop])
        for layer in range(4):
            found = replay.hidden(chunk, rows, layer)
            assert found is not None
            assert torch.equal(found, hidden)
            if layer < 3:
                hidden = small.layer(layer, hidden, cache, rows.start)
    assert [state.cache.tensor(layer)._version for layer in range(3)] == versions
    assert all(torch.equal(one, state.cache.tensor(layer)) for layer, one in enumerate(before))


def test_a_replay_says_where_the_run_has_not_come_to(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=4) as begun:
        begun.prepare(IDS)
        engine = begun.engines[0]
        replay = LayerReplay(small, Inventory(PromptOnRank(engine, Tokens(engine))))
        assert replay.hidden(0, range(4), 0) is not None
        assert replay.hidden(0, range(4), 1) is None
        assert replay.hidden(0, range(4), 2) is None


def test_it_can_be_stopped(made: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    references = references_of(made.engines[0])
    monkeypatch.setattr("dinfer.rank.reference._settle", lambda _: references.stop(StopReference()))
    with pytest.raises(Stopped, match="interrupted"):
        references.run(REQUEST)

"""What a rank answers when it is to compare what it holds with the reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dinfer.engine.engine import Engine
from dinfer.engine.prefill import Prefill
from dinfer.model.decoder import Decoder
from dinfer.rank.decode import Tokens
from dinfer.rank.examine import LayerReplay
from dinfer.rank.inventory import Inventory
from dinfer.rank.reference import References, Stopped, reference_commands
from tests.support.twin import Twin, prompt, twin

IDS = list(prompt(10))
REQUEST = {"chunked": True, "dtype": "float32", "chunks": 3}


@pytest.fixture
def made(small: Decoder) -> Iterator[Twin]:
    """Two ranks at the end of prefill: 3 layers, 3 chunks of 4 tokens."""
    with twin(small, world_size=2, chunk_size=4, max_new_tokens=4) as found:
        found.all(lambda engine: engine.prefill_phase(IDS))
        yield found


def host(engine: Engine, tokens: Tokens | None = None) -> Any:
    return SimpleNamespace(decoder=engine.decoder, engine=engine, tokens=tokens)


def items(said: dict[str, Any], name: str) -> list[list[Any]]:
    return [one[1:] for one in said["items"] if one[0] == name]


def test_what_is_held(made: Twin) -> None:
    one, other = (References(host(engine)).held({}) for engine in made.engines)
    assert one["held"] == one["due"] == [10, 10, 10]
    assert (one["dtype"], one["tokens"], one["count"]) == ("float32", [], len(one["items"]))
    assert [key[:2] for key in items(one, "kv")] == [
        [chunk, layer] for chunk in range(3) for layer in range(3)
    ]
    assert [key[:3] for key in items(one, "kv")] == [key[:3] for key in items(other, "kv")]
    assert all(list(then) == now for *_, now, then, _ in items(one, "kv"))
    stage = made.engines[1].executor.plan.shape.starts[1]
    assert [key[:2] for key in items(other, "hidden")] == [[0, stage], [1, stage], [2, stage], [2, 4]]


def test_digests_are_the_references(made: Twin) -> None:
    for engine in made.engines:
        references = References(host(engine))
        now = {(c, n): k for c, n, k, *_ in items(references.held({}), "kv")}
        hidden = {(c, n): digest for c, n, digest in items(references.held({}), "hidden")}
        said = json.loads(json.dumps(references.run(REQUEST)))
        assert {(c, n): k for c, n, k in items(said, "kv")} == now
        assert hidden.items() <= {(c, n): digest for c, n, digest in items(said, "hidden")}.items()
        assert (said["exact"], said["rows"], said["threads"], said["device"]) == (True, 10, 1, "cpu")
        assert all(one[7] == 0 for one in items(said, "measured"))
        assert len(items(said, "measured")) == 3 * 3 * 2 + 3 * 4 + 1
        assert items(said, "rows") == said["choices"] == []


def test_new_tokens_are_one_more_block(made: Twin) -> None:
    all_tokens = [Tokens(engine) for engine in made.engines]
    for one in all_tokens:
        one.limit_to(4)
    made.all(lambda engine: all_tokens[engine.rank].run(lambda *_: None))
    references = References(host(made.engines[0], all_tokens[0]))
    held = references.held({})
    assert held["held"] == held["due"] == [13, 13, 13]
    assert len(held["tokens"]) == 4
    said = references.run(REQUEST)
    assert said["rows"] == 13
    assert [one for one in items(said, "kv") if one[0] == 3] == [
        [c, n, k] for c, n, k, *_ in items(held, "kv") if c == 3
    ]
    assert said["choices"] == []


def test_a_replay_is_what_the_run_had_and_leaves_its_kv_alone(made: Twin, small: Decoder) -> None:
    engine = made.engines[1]
    state: Prefill = engine.executor.state
    before = [state.cache.tensor(layer).clone() for layer in range(3)]
    versions = [state.cache.tensor(layer)._version for layer in range(3)]
    replay, cache = LayerReplay(small, Inventory(engine.executor, [])), small.new_cache(10)
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
        replay = LayerReplay(small, Inventory(begun.engines[0].executor, []))
        assert replay.hidden(0, range(4), 0) is not None
        assert replay.hidden(0, range(4), 1) is None
        assert replay.hidden(0, range(4), 2) is None


def test_pages(made: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinfer.rank.reference.PAGE_BYTES", 300)
    table = reference_commands(host(made.engines[0]))
    said = table["reference"].function(REQUEST)
    assert 0 < len(said["items"]) < said["count"]
    found = list(said["items"])
    while len(found) < said["count"]:
        page = table["reference_page"].function({"start": len(found)})["items"]
        assert page
        assert len(json.dumps(page)) < 1000
        found += page
    assert len(found) == said["count"]
    assert [name for name, command in table.items() if command.slow] == ["reference_held", "reference"]


def test_it_can_be_stopped(made: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    references = References(host(made.engines[0]))
    monkeypatch.setattr("dinfer.rank.reference._settle", lambda _: references.stop({}))
    with pytest.raises(Stopped, match="interrupted"):
        references.run(REQUEST)


def test_without_a_prompt_it_says_so(small: Decoder) -> None:
    nobody: Any = SimpleNamespace(decoder=small, engine=None, tokens=None)
    with pytest.raises(RuntimeError, match="no prompt yet"):
        References(nobody).held({})

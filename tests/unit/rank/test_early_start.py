"""A start of decode on one rank counts only if nothing has changed since it began; else decode computes anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

from dinfer.engine.corruption import Corrupted
from dinfer.engine.engine import Engine
from dinfer.errors import NotPossible
from dinfer.model.decoder import Decoder
from dinfer.plan.faults import Fault
from dinfer.rank import decode
from dinfer.rank.decode import Tokens
from dinfer.rank.faults import set_faults
from tests.support.runs import wait_for
from tests.support.twin import Twin, prompt, twin

IDS = list(prompt(40))
TOKENS = 6


@pytest.fixture
def made(small: Decoder) -> Iterator[Twin]:
    with twin(small, world_size=1, chunk_size=16, max_new_tokens=TOKENS, on_corruption="pause") as one:
        yield one


class Begun:
    """Tokens of a prompt that has come to its end, and whose first two were computed early if `early`."""

    def __init__(self, made: Twin, *, early: bool) -> None:
        (self.engine,) = made.engines
        executor = self.engine.prepare(IDS)
        self.tokens, self.text = Tokens(self.engine), ""
        if early:
            self.tokens.expect(TOKENS, lambda _: None)
            assert self.tokens._early
        self.engine.prompt.go((tuple(len(lane.ops) for lane in executor.plan.lanes[0]),))
        assert executor.wait(executor.is_done, 60)
        if early:
            assert self.tokens._early
            self.tokens._early._thread.join(60)
            assert self.tokens._early._is_whole

    def run(self, limit: int = TOKENS) -> list[int]:
        """As a rank does when decode is asked for."""
        self.engine.prompt.edits.report()
        self.tokens.limit_to(limit)
        try:
            return list(self.tokens.run(self._told).tokens)
        finally:
            self.engine.prompt.edits.accept_all()

    def _told(self, _: int, __: int, text: str) -> None:
        at = self.tokens.characters - len(text)
        self.text = self.text[:at] + text


def edit(engine: Engine) -> None:
    assert engine.cache
    for layer in range(engine.cache.layers):
        engine.cache.tensor(layer)[:30].mul_(-3.0)


def edit_that_was_reported(engine: Engine) -> None:
    """As a graft leaves it."""
    edit(engine)
    assert engine.prompt.new_edits()


def strike(engine: Engine) -> None:
    assert engine.cache
    before = engine.cache.sha256(len(IDS))
    fault = Fault(0, "zero", "memory", 0, 0, 0)
    set_faults(engine, [fault], lambda _: None)
    assert engine.cache.sha256(len(IDS)) != before


def grow(engine: Engine) -> None:
    engine.grow_cache(1000)
    edit(engine)


CHANGES = [edit, edit_that_was_reported, strike, grow]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stopped_at", [None, 0, 1])
def test_what_changes_after_prefill_or_a_stop_changes_all_later_tokens_alike(
    made: Twin, change: Callable[[Engine], None], stopped_at: int | None
) -> None:
    results = []
    for early in (False, True):
        begun = Begun(made, early=early)
        if stopped_at is not None:
            assert len(begun.run(stopped_at)) == stopped_at
        change(begun.engine)
        tokens = begun.run() or begun.run()
        assert begun.engine.cache
        results.append((tokens, begun.text, begun.engine.cache.sha256(len(IDS) + 4)))
    assert results[0] == results[1]
    assert len(results[0][0]) == TOKENS


def test_what_was_begun_is_used_where_nothing_has_changed(
    made: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Decoder.forward, list[int]()

    def counted(self: Decoder, *args: Any) -> Tensor:
        calls.append(1)
        return forward(self, *args)

    monkeypatch.setattr(Decoder, "forward", counted)
    found = []
    for early in (False, True):
        calls.clear()
        begun = Begun(made, early=early)
        calls.clear()
        found.append((begun.run(), begun.text))
        assert len(calls) == TOKENS - 1 - early
    assert found[0] == found[1]


def test_the_text_is_whole_after_a_decode_that_did_not_begin(
    made: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Begun(made, early=False)
    tokens, text = wanted.run(), wanted.text
    begun, recheck = Begun(made, early=True), made.engines[0].recheck

    def corrupted() -> None:
        raise Corrupted("a block has changed")

    monkeypatch.setattr(made.engines[0], "recheck", corrupted)
    assert begun.run() == []
    monkeypatch.setattr(made.engines[0], "recheck", recheck)
    assert (begun.run(), begun.text) == (tokens, text)


def test_a_start_that_fails_is_computed_anew(made: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, embed = Begun(made, early=False).run(), Decoder.embed
    engine = made.engines[0]

    def broken(self: Decoder, ids: list[int]) -> Tensor:
        if "start of decode" in threading.current_thread().name:
            raise OSError("as by a hook of the user's")
        return embed(self, ids)

    monkeypatch.setattr(Decoder, "embed", broken)
    executor, tokens = engine.prepare(IDS), Tokens(engine)
    tokens.expect(TOKENS, lambda _: None)
    early = tokens._early
    assert early
    engine.prompt.go((tuple(len(lane.ops) for lane in executor.plan.lanes[0]),))
    assert executor.wait(executor.is_done, 60)
    early._thread.join(60)
    assert not early._is_whole
    tokens.limit_to(TOKENS)
    assert list(tokens.run(lambda *_: None).tokens) == wanted


def test_who_gives_up_a_start_that_hangs_is_refused(made: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "GIVE_UP_S", 0.01)
    engine, told, go = made.engines[0], threading.Event(), threading.Event()

    def hang(_: str) -> None:
        told.set()
        go.wait(60)

    executor, tokens = engine.prepare(IDS), Tokens(engine)
    tokens.expect(TOKENS, hang)
    engine.prompt.go((tuple(len(lane.ops) for lane in executor.plan.lanes[0]),))
    assert told.wait(60)
    with pytest.raises(NotPossible, match="recover"):
        tokens.give_up_start()
    go.set()
    early = tokens._early
    assert early
    wait_for(lambda: not early._thread.is_alive(), "the start has ended")
    tokens.give_up_start()
    assert tokens._early is None

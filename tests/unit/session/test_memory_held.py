"""What a session's ranks hold in memory: one checkpoint, and the KV of one prompt, whoever still knows another."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from dinfer.cluster.ranks import RankRefused
from dinfer.cluster.threads import LocalRanks
from dinfer.engine.ops import HANDLERS, Outcome
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.rank.service import RankService
from dinfer.session.session import Session
from tests.support.fixtures import fresh_session
from tests.support.twin import prompt

IDS = prompt(10)
WAIT_S = 60


RANKS = 2
session = fresh_session


def hosts(session: Session) -> list[RankService]:
    assert isinstance(session.ranks, LocalRanks)
    return session.ranks.hosts


def test_another_checkpoint_is_loaded_once_the_one_before_is_gone(
    session: Session, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session.prefill(IDS, chunk_size=4, max_new_tokens=3)
    run.decode(2)
    decoder = hosts(session)[0].decoder
    assert decoder
    before = weakref.ref(decoder.model)
    lanes = [thread for host in hosts(session) if host.engine for thread in host.engine.executor._threads]
    assert len(lanes) > 2
    del run, decoder
    names: list[tuple[object, object]] = []
    for host in hosts(session):
        host._on_engine = lambda its: names.append((its.engine, its.decoder))
    load, alive = Decoder.load, list[bool]()

    def loaded(*given: Any, **named: Any) -> Decoder:
        alive.append(before() is not None)
        assert names[-2:] == [(None, None)] * 2  # those of `%%px` cells, too
        return load(*given, **named)

    monkeypatch.setattr(Decoder, "load", loaded)
    session.load(str(model), dtype="bfloat16", threads=1)
    assert alive == [False]
    assert not any(thread.is_alive() for thread in lanes)
    assert len(session.prefill(IDS, chunk_size=4, max_new_tokens=3).decode(2).tokens) == 2
    assert {str(host.decoder.dtype) for host in hosts(session) if host.decoder} == {"torch.bfloat16"}


def test_a_checkpoint_is_refused_while_lanes_are_blocked_and_loaded_by_recover(
    session: Session, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door, in_it, unbroken = threading.Event(), threading.Event(), HANDLERS["layer"]

    def stops(state: Any, op: Any, comm: Any) -> Outcome:
        if str(op) == "layer c1 l1":
            in_it.set()
            assert door.wait(WAIT_S)
        return unbroken(state, op, comm)

    monkeypatch.setitem(HANDLERS, "layer", stops)
    session.prefill(IDS, chunk_size=4, schedule="lockstep")
    assert in_it.wait(WAIT_S)
    with pytest.raises(
        RankRefused, match=r"lanes blocked in the run before.*session\.recover\(\) frees them"
    ):
        session.load(str(model), dtype="bfloat16", threads=1)
    door.set()
    session.recover()
    session.prefill(IDS, chunk_size=4).wait(WAIT_S)
    assert {str(host.decoder.dtype) for host in hosts(session) if host.decoder} == {"torch.bfloat16"}


def test_the_kv_of_a_new_prompt_is_made_once_that_before_is_gone(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.prefill(IDS, chunk_size=4).wait(WAIT_S)
    known = [host.engine for host in hosts(session)]  # as `engine` is under `%%px`
    before = [weakref.ref(engine.cache) for engine in known if engine and engine.cache]
    assert len(before) == 2
    new_cache, alive = Decoder.new_cache, list[bool]()

    def made(self: Decoder, capacity: int) -> KVCache:
        if capacity >= len(IDS):
            rank = int(threading.current_thread().name.removeprefix("dinfer rank ").partition("_")[0])
            alive.append(before[rank]() is not None)
        return new_cache(self, capacity)

    monkeypatch.setattr(Decoder, "new_cache", made)
    session.prefill(IDS, chunk_size=4).wait(WAIT_S)
    assert alive == [False, False]
    assert [engine.cache for engine in known if engine] == [None, None]

"""Decode in a session whose ranks are threads: stopped and broken off, all ranks come to the same token."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import dinfer
from dinfer.cluster.ranks import Pending, RankRefused
from dinfer.cluster.threads import LocalRanks
from dinfer.engine.decoding import Decoding
from dinfer.messages import HashKv
from dinfer.rank.commands import OnThread
from dinfer.rank.decode import Tokens
from dinfer.rank.service import RankService
from dinfer.run.failure import RankFailed
from dinfer.run.moves import Moves
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.severity import Severity
from tests.support.fixtures import fresh_session
from tests.support.runs import wait_for
from tests.support.threads import session_on_threads
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

IDS = prompt(10)
WAIT_S = 120.0
session = fresh_session


def hosts(session: Session) -> list[RankService]:
    assert isinstance(session.ranks, LocalRanks)
    return session.ranks.hosts


def decoded(session: Session, tokens: int = 1) -> Run:
    """A run that has made so many tokens."""
    run = session.prefill(IDS, chunk_size=4, max_new_tokens=60)
    run.decode(tokens)
    return run


def begin(call: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    """Have a thread make a call that may not end; what comes of it."""
    came: list[Any] = []

    def go() -> None:
        try:
            came.append(call())
        except BaseException as error:  # which the test looks at
            came.append(error)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    return thread, came


def test_why_there_are_no_more_tokens_is_said(tmp_path: Path) -> None:
    positions = tiny_checkpoint(tmp_path / "short", layers=2, max_position_embeddings=14)
    with session_on_threads(2, positions) as session:
        run = session.prefill(IDS, chunk_size=4, max_new_tokens=60)
        some = run.decode(2)
        assert (some.stopped, some.ended) == ("max_new_tokens", False)
        assert str(some).endswith("(2 new tokens, 2 in all)")
        rest = run.decode()
        assert (rest.stopped, rest.ended, rest.count) == ("positions", True, 5)
        assert "all positions of the model are used" in str(rest)
    last = int(rest.tokens[-1])
    ending = tiny_checkpoint(tmp_path / "ending", layers=2, max_position_embeddings=14, eos_token_id=last)
    with session_on_threads(2, ending) as session:
        ended = session.prefill(IDS, chunk_size=4, max_new_tokens=60).decode()
        assert (ended.stopped, ended.ended) == ("end of text", True)
        assert str(ended).endswith(" in all, and the text ends here)")
        assert "(1 new token," in str(session.prefill(IDS, chunk_size=4).decode(1))


def test_what_ranks_decoded_before_they_disagreed_is_compared(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step = decoded(session), Decoding.step

    def other_at_3(self: Decoding) -> int:
        if self._comm.rank == 1 and len(self.tokens) == 3:
            monkeypatch.setattr(self, "_sampler", lambda logits, _: int(logits.argmin()))
        return step(self)

    monkeypatch.setattr(Decoding, "step", other_at_3)
    with pytest.raises(RankRefused, match="tokens differ, first at new token 3"):
        run.decode(8)
    assert "tokens differ, first at new token 3" in str(run.where())
    assert run.where().severity == Severity.ERROR
    assert "tokens differ, first at new token 3" in run.story[-1]
    found = run.compare("reference")
    assert found.equal, found.verdict
    assert "and 3 new tokens, fed one by one" in str(found)


@pytest.mark.parametrize("counted", [0, 2])
def test_new_tokens_of_a_decode_that_failed_are_left_out_of_diff_and_saved_run(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counted: int
) -> None:
    """Ranks hold their rows; the run counts only those of decodes that have ended."""
    run, step = session.prefill(IDS, chunk_size=4, paused=True), Decoding.step
    if counted:
        run.decode(counted)

    def other_at_4(self: Decoding) -> int:
        if self._comm.rank == 1 and len(self.tokens) == 4:
            monkeypatch.setattr(self, "_sampler", lambda logits, _: int(logits.argmin()))
        return step(self)

    monkeypatch.setattr(Decoding, "step", other_at_4)
    with pytest.raises(RankRefused, match="tokens differ"):
        run.decode(8)
    assert len(run.tokens) == counted
    assert run.kv().diff().equal
    saved = dinfer.open(run.save(tmp_path / "saved"))
    assert saved.diff(run).equal


def test_decode_that_a_breakpoint_ends_says_how_to_go_on(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=4, paused=True)
    run.break_at(layer=0, chunk=1)
    said = run.decode(1)
    assert said.tokens == ()
    assert str(said) == (
        "prefill is not done: stopped at #1: after layer 0, chunk 1\n"
        "run.resume() or run.decode() goes on from there; run.breakpoints.clear() removes all breakpoints"
    )
    assert len(run.decode(1).tokens) == 1
    run.restart()
    run.breakpoints.clear()
    assert len(run.decode(1).tokens) == 1


def paused_meanwhile(run: Run) -> None:
    """Another thread pauses the run, and is done with it."""
    thread, came = begin(run.pause)
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert not isinstance(came[0], BaseException), came


def test_a_pause_before_the_first_token_is_not_lost(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, finish = session.prefill(IDS, chunk_size=4, paused=True), Moves.finish

    def finished(self: Moves, is_stopped: Callable[[], bool], on_way: Callable[[], None]) -> bool:
        ended = finish(self, is_stopped, on_way)
        paused_meanwhile(run)
        return ended

    monkeypatch.setattr(Moves, "finish", finished)
    found = run.decode(3)
    assert (found.tokens, found.stopped, run.tokens) == ((), "user", [])
    monkeypatch.undo()
    assert len(run.decode(3).tokens) == 3


def test_a_pause_before_the_prefill_of_decode_has_begun_is_not_lost(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, resume = session.prefill(IDS, chunk_size=4, paused=True), Moves.resume

    def resumed(self: Moves) -> None:
        paused_meanwhile(run)
        monkeypatch.undo()
        resume(self)

    monkeypatch.setattr(Moves, "resume", resumed)
    assert "prefill is not done" in str(run.decode(3))
    assert run.standing().state == "paused"
    assert len(run.decode(3).tokens) == 3


def tokens_by_rank(session: Session) -> list[list[int]]:
    return [host.prompt.tokens.tokens for host in hosts(session) if host.prompt]


def test_a_pause_between_two_tokens_stops_all_ranks_at_the_same(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 has begun a token when it is told to stop, rank 1 has ended the one before, and asks whether to go on
    before it hears how far the others are."""
    run = decoded(session)
    told, asked, begun = (threading.Event() for _ in range(3))
    limit_to, may_begin = Tokens.limit_to, Tokens._begin

    def limited(self: Tokens, limit: int | None) -> int:
        if limit is not None and told.is_set() and self is slow:
            assert asked.wait(WAIT_S)
        found = limit_to(self, limit)
        if limit is None and self is slow:
            told.set()
        return found

    def asks(self: Tokens, decoding: Any) -> bool:
        if self is slow and len(decoding.tokens) == 3:
            begun.set()
            assert told.wait(WAIT_S)
            asked.set()
        return may_begin(self, decoding)

    first, slow = (host.prompt.tokens for host in hosts(session)[:2] if host.prompt)
    monkeypatch.setattr(Tokens, "limit_to", limited)
    monkeypatch.setattr(Tokens, "_begin", asks)
    thread, came = begin(partial(run.decode, 20))
    assert begun.wait(WAIT_S)
    wait_for(lambda: first._begun == 4, "rank 0 has begun the next")
    run.pause()
    thread.join(WAIT_S)
    assert came, "decode has not returned"
    assert len(came[0].tokens) == 3, came[0]
    assert tokens_by_rank(session) == [run.tokens] * 3
    assert len(run.decode(2).tokens) == 2


def test_an_interrupt_after_a_rank_has_answered_does_not_lose_its_answer(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = decoded(session)
    states, door = session.ranks, threading.Event()
    unbroken, ask, told = Tokens.run, states._is_answered, threading.Event()

    def late(self: Tokens, on_token: Any) -> Any:
        answer, slow = unbroken(self, on_token), hosts(session)[1].prompt
        assert not slow or self is not slow.tokens or door.wait(WAIT_S)
        return answer

    def answered(ids: Pending[Any]) -> bool:
        has_answered = [ids[rank] in states._replies for rank in ids]
        if has_answered[:2] == [True, False] and len(ids) == 3 and not told.is_set():
            told.set()
            raise KeyboardInterrupt
        if told.is_set():
            door.set()
        return ask(ids)

    monkeypatch.setattr(Tokens, "run", late)
    monkeypatch.setattr(states, "_is_answered", answered)
    before, texts = len(run.text), list[str]()
    with pytest.raises(KeyboardInterrupt):
        run.decode(3, on_text=texts.append)
    assert "".join(texts) == run.text[before:], "each piece is shown once"
    assert len(run.tokens) == 4
    assert tokens_by_rank(session) == [run.tokens] * 3
    assert not states._replies
    assert len(run.decode(2).tokens) == 2


def test_an_answer_that_nobody_waits_for_any_more_is_dropped(session: Session) -> None:
    states, door = session.ranks, threading.Event()
    assert isinstance(states, LocalRanks)
    for pool in states.pools.values():
        pool.submit(door.wait, WAIT_S)
    with pytest.raises(TimeoutError, match="no answer from ranks 0–2"):
        states.ask(dict.fromkeys(range(3), HashKv(1)), 0.0)
    door.set()
    for pool in states.pools.values():  # their answers have come when what was asked later is done
        pool.submit(lambda: None).result(WAIT_S)
    assert not states._replies


def test_a_refusal_is_told_though_another_rank_never_answers(session: Session) -> None:
    door, states = threading.Event(), session.ranks
    assert isinstance(states, LocalRanks)
    states.pools[1, OnThread.LOOKING].submit(door.wait, WAIT_S)
    try:
        with pytest.raises(RankRefused, match="rank 0 holds no run"):
            states.ask(dict.fromkeys((0, 1), HashKv(1)), 3.0)
    finally:
        door.set()


def test_an_error_of_one_rank_in_decode_is_the_runs_failure(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = decoded(session, 6)
    wanted = run.tokens
    run.step_back("token", 4)
    step = Decoding.step

    def broken(self: Decoding) -> int:
        if self._comm.rank == 1 and len(self.tokens) == 3:
            raise MemoryError("on rank 1 only")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Decoding, "step", broken)
        sentence = "rank 1 failed at new token 3: MemoryError: on rank 1 only"
        with pytest.raises(RankFailed, match=f"^{sentence}"):
            run.decode(4)
    assert run.standing().state == "failed"
    assert run.standing().message.startswith(sentence)
    verdict = run.verdict()
    assert (verdict.kind, verdict.rank, verdict.blocked) == ("exception", 1, (0, 2)), verdict
    assert verdict.sentence == sentence
    for words in (sentence, "rank 1:\nTraceback"):
        wait_for(partial(is_logged, session, words), "the log says it")
    run.restart()  # which frees the others
    assert list(run.decode(6).tokens) == wanted


def is_logged(session: Session, words: str) -> bool:
    return any(words in line for line in session.log)

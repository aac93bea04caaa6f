"""After any failed run the next one just works: what is blocked is freed by itself, in one line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinfer.cluster.ranks import RankRefused
from dinfer.config import ConfigError
from dinfer.engine.decoding import Decoding
from dinfer.engine.ops import HANDLERS, Outcome
from dinfer.errors import DinferError
from dinfer.plan.ops import PlanError
from dinfer.rank import service
from dinfer.rank.agreement import agree
from dinfer.run.failure import RankFailed
from dinfer.run.hang import Hung
from dinfer.run.run import Run
from dinfer.run.state import RunState
from dinfer.session.session import Session
from tests.support.expected_tokens import expected
from tests.support.threads import session_on_threads
from tests.support.twin import prompt

IDS = tuple(prompt(10))
CHUNK, NEW, RANKS = 4, 3, 3
DEADLINE_S = 60.0
FREED = "lanes that the run before had left blocked are freed: all ranks have met again"

Break = Callable[[Session, pytest.MonkeyPatch], None]


def begun(session: Session, **parameters: Any) -> Run:
    return session.prefill(IDS, paused=True, chunk_size=CHUNK, max_new_tokens=NEW, **parameters)


def raise_on_rank_1(session: Session, patch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 2 wait for its blocks."""
    unbroken = HANDLERS["layer"]

    def broken(state: Any, op: Any, comm: Any) -> Outcome:
        if state.rank == 1 and op.chunk == 1:
            raise ValueError("broken on purpose")
        return unbroken(state, op, comm)

    patch.setitem(HANDLERS, "layer", broken)
    run = begun(session)
    run.resume()
    with pytest.raises(RankFailed, match="broken on purpose"):
        run.wait(DEADLINE_S)


def deadlock(session: Session, patch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    run = begun(session, schedule="batched", unsafe=True)
    run.resume()
    with pytest.raises(Hung):
        run.wait(DEADLINE_S)


def fail_in_decode(session: Session, patch: pytest.MonkeyPatch) -> None:
    """The others wait for rank 1's token."""
    step = Decoding.step

    def broken(self: Decoding) -> int:
        if self._comm.rank == 1 and self.tokens:
            raise MemoryError("on rank 1 only")
        return step(self)

    patch.setattr(Decoding, "step", broken)
    with pytest.raises(RankFailed, match="on rank 1 only"):
        begun(session).decode(NEW)


def fail_to_prepare(session: Session, patch: pytest.MonkeyPatch) -> None:
    """The others wait for rank 1 to agree on the prompt."""

    def broken(comm: Any, facts: Any) -> None:
        if comm.rank == 1:
            raise MemoryError("on rank 1 only")
        agree(comm, facts)

    patch.setattr(service, "agree", broken)
    with pytest.raises(DinferError, match="on rank 1 only"):
        begun(session)


def interrupt(session: Session, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in `run.wait()`."""
    run, is_doing = begun(session), RunState.is_doing

    def interrupted(state: RunState, activities: Any, wait_s: float = 0.0) -> bool:
        if not wait_s:  # the session's thread, which only looks
            return is_doing(state, activities)
        patch.setattr(RunState, "is_doing", is_doing)
        raise KeyboardInterrupt

    run.resume()
    patch.setattr(RunState, "is_doing", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.wait(DEADLINE_S)


def give_an_unknown_token(session: Session, patch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    with pytest.raises((ConfigError, DinferError)):
        session.prefill((5, 10**9), chunk_size=CHUNK)


def give_a_plan_that_can_hang(session: Session, patch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    with pytest.raises(PlanError):
        begun(session, schedule="batched")


def leave_it_running(session: Session, patch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    begun(session).resume()


BLOCKED = [raise_on_rank_1, deadlock, fail_in_decode, fail_to_prepare]
FREE = [interrupt, give_an_unknown_token, give_a_plan_that_can_hang, leave_it_running]


def works(run: Run, model: Path) -> None:
    wanted = expected(model, IDS, CHUNK, NEW)
    assert list(run.decode(NEW).tokens) == wanted.tokens
    assert run.sha256() == [wanted.kv_sha256] * RANKS


@pytest.mark.parametrize("break_it", [*BLOCKED, *FREE], ids=lambda one: one.__name__)
def test_the_next_prefill_just_works(
    model: Path, capsys: pytest.CaptureFixture[str], break_it: Break
) -> None:
    with session_on_threads(RANKS, model) as session:
        with pytest.MonkeyPatch.context() as patch:
            break_it(session, patch)
        capsys.readouterr()
        works(begun(session), model)
        said = capsys.readouterr().out
        assert (FREED in said) == (break_it in BLOCKED)
        assert said.count("\n") == (break_it in BLOCKED)
        works(begun(session), model)  # nothing is left to free
        assert capsys.readouterr().out == ""


def test_kv_is_compared_at_once_where_ranks_are_blocked_in_decode(model: Path) -> None:
    with session_on_threads(RANKS, model) as session:
        with pytest.MonkeyPatch.context() as patch:
            fail_in_decode(session, patch)
        # The others wait for rank 1's token; who has come to no token more holds the prompt's KV all the same.
        assert session.run.kv().diff().equal
        assert session.run.sha256() == [expected(model, IDS, CHUNK, NEW).kv_sha256] * RANKS


@pytest.mark.parametrize("break_it", BLOCKED[:3], ids=lambda one: one.__name__)
def test_restart_just_works(model: Path, capsys: pytest.CaptureFixture[str], break_it: Break) -> None:
    with session_on_threads(RANKS, model) as session:
        with pytest.MonkeyPatch.context() as patch:
            break_it(session, patch)
        capsys.readouterr()
        session.run.restart()
        assert FREED in capsys.readouterr().out
        if break_it is not deadlock:  # whose plan hangs again
            works(session.run, model)


def test_a_checkpoint_is_loaded_after_a_failed_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with session_on_threads(RANKS, model) as session:
        with pytest.MonkeyPatch.context() as patch:
            raise_on_rank_1(session, patch)
        session.load(str(model), dtype="bfloat16", threads=1)
        assert FREED in capsys.readouterr().out
        assert begun(session).decode(NEW).tokens


@pytest.mark.slow
def test_a_rank_that_computes_on_is_named_and_waited_for_by_the_next_but_one(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never killed but by `recover`."""
    door, in_it, unbroken = threading.Event(), threading.Event(), HANDLERS["layer"]

    def stops(state: Any, op: Any, comm: Any) -> Outcome:
        if str(op) == "layer c1 l1":
            in_it.set()
            assert door.wait(4 * DEADLINE_S)
        return unbroken(state, op, comm)

    with session_on_threads(RANKS, model) as session:
        monkeypatch.setitem(HANDLERS, "layer", stops)
        begun(session, schedule="lockstep").resume()
        assert in_it.wait(DEADLINE_S)
        with pytest.raises(RankRefused, match=r"lanes blocked in the run before.*session\.recover\(\)"):
            begun(session)
        with pytest.raises(RankRefused, match=r"does not come free of its op: session\.recover\(\)"):
            begun(session)
        door.set()
        capsys.readouterr()
        works(begun(session), model)
        assert FREED in capsys.readouterr().out


def test_recover_by_hand_leaves_nothing_to_free(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with session_on_threads(RANKS, model) as session:
        with pytest.MonkeyPatch.context() as patch:
            raise_on_rank_1(session, patch)
        session.recover()
        capsys.readouterr()
        works(begun(session), model)
        assert capsys.readouterr().out == ""


def test_a_run_whose_lanes_the_next_one_frees_is_over_and_has_not_failed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlock(session, monkeypatch)
    hung = session.run
    begun(session)
    assert hung.standing().state == "closed"
    assert "recovered" not in hung.standing().message

"""Ranks that are killed or stopped at any op: named to the op, brought back, and the run comes out as if nothing had
been."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

import dinfer
from dinfer.plan.ops import Op
from dinfer.run.failure import RankFailed
from dinfer.run.run import Run
from dinfer.run.state import RECOVER, RESTART
from dinfer.session.session import Session
from tests.support.runs import wait_for
from tests.support.strikes import Signal, Strike
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IDS = tuple(prompt(22))
TOKENS = 6
MOMENTS = ("free run", "step", "decode", "paused")
SEEDS = range(30)
Attack = Callable[[Run, Strike, Random], str]
"""breaks the run's rank; what the message about it must say of its place"""


@dataclass
class Broken:
    """One trial: what was struck, and what had to be said of it."""

    run: Run
    rank: int
    signal: Signal
    place: str
    named_s: float


@dataclass(frozen=True)
class Wanted:
    """What an uninterrupted run gives."""

    tokens: list[int]
    sha256: list[str]


@pytest.fixture(scope="module")
def wanted(session: Session) -> Wanted:
    return outcome(begin(session))


@pytest.fixture(autouse=True)
def brought_back(session: Session) -> Iterator[None]:
    """What a test that fails leaves broken does not fail those after it."""
    yield
    if session.ranks.silent() or any(code is not None for code in session.ranks.exits()):
        session.recover()


def begin(session: Session) -> Run:
    return session.prefill(IDS, paused=True, chunk_size=4, max_new_tokens=TOKENS)


def outcome(run: Run) -> Wanted:
    run.decode()
    return Wanted(run.tokens, run.sha256())


# -- how a rank is broken


def in_a_free_run(run: Run, strike: Strike, random: Random) -> str:
    op = any_op(run, strike.rank, random)
    strike.in_op(op)
    run.resume()
    return f"in `{op}`"


def step_on(run: Run, unit: str) -> None:
    """Until something stops it."""
    for _ in range(10_000):
        run.step(unit)


def in_a_step(run: Run, strike: Strike, random: Random) -> str:
    op = any_op(run, strike.rank, random)
    strike.in_op(op)
    unit = random.choice(["op", "layer", "wave", "chunk"])
    with pytest.raises(RankFailed):
        step_on(run, unit)
    return f"in `{op}`"


def in_decode(run: Run, strike: Strike, random: Random) -> str:
    token = random.randrange(1, TOKENS)
    strike.before_token(token)
    with pytest.raises(RankFailed):
        run.decode()
    return f"decode, token {token}"


def while_paused(run: Run, strike: Strike, random: Random) -> str:
    cut = random.randrange(1, 20)
    run.step("layer", cut)
    mine = f"rank {strike.rank}: "
    place = next(line for line in str(run.where()).splitlines() if line.startswith(mine))
    strike.from_outside()
    return place.removeprefix(mine)


ATTACKS: dict[str, Attack] = {
    "free run": in_a_free_run,
    "step": in_a_step,
    "decode": in_decode,
    "paused": while_paused,
}


def any_op(run: Run, rank: int, random: Random) -> Op:
    return random.choice([op for lane in run.plan.lanes[rank] for op in lane.ops])


# -- one trial


def broken(session: Session, tmp_path: Path, seed: int, what: Signal | None = None) -> Broken:
    """Break one rank of a new run; returns once it has been named."""
    random = Random(seed)
    rank, moment = seed % 3, MOMENTS[seed // 3 % 4]
    signals: list[Signal] = ["SIGKILL", "SIGSTOP"]
    kind: Signal = what if what is not None else random.choice(signals)
    run = begin(session)
    strike = Strike(session, rank, kind, tmp_path / "struck")
    place = ATTACKS[moment](run, strike, random)
    wait_for(strike.has_struck, f"rank {rank} is struck: {place}")
    wait_for(lambda: run.failure or run.silence, f"somebody is named: {run.where()}")
    named_s = strike.seconds_ago()
    print(f"\nseed {seed}: rank {rank}, {kind}, {moment}: named {named_s:.2f} s after it")
    return Broken(run, rank, kind, place, named_s)


def check_named(trial: Broken) -> None:
    """Who, how and where, and nobody else; the user hears it from whatever they do next."""
    how = "is gone" if trial.signal == "SIGKILL" else "does not answer: its process is stopped"
    said = trial.run.failure or trial.run.silence
    first = said.splitlines()[0]
    assert re.match(rf"rank {trial.rank} {re.escape(how)}", said), said
    # Of a rank that computes, this is told; of one that does not, three of the transfers that it is in.
    assert trial.place in first or " in `layer " in first or first.count(" in `") == 3, (trial.place, said)
    with pytest.raises(RankFailed, match=rf"^rank {trial.rank} "):
        trial.run.step()
    standing = trial.run.standing()
    assert standing.message.startswith(f"rank {trial.rank} ")
    assert (standing.state, standing.remedy) == ("lost", RECOVER)
    assert [rank for rank, lives in enumerate(standing.alive) if not lives] == [trial.rank]


def check_saved(trial: Broken, folder: Path) -> None:
    """It can be saved as far as its ranks answer; opened, it says the same of the one that does not."""
    saved = dinfer.open(trial.run.save(folder))
    assert saved.verdict().sentence == trial.run.verdict().sentence
    assert saved.verdict().rank == trial.rank
    # In decode the others wait for its token, and answer all the same: reads have a thread of their own.
    assert set(saved.source().ranks) == {0, 1, 2} - {trial.rank}


def check_recovered(
    session: Session, run: Run, ranks: set[int], wanted: Wanted, bare: tuple[int, ...] = ()
) -> None:
    """Those ranks come back under their ids; the others keep process and, but for `bare` ones, weights; the run
    begins anew."""
    cluster = session.ranks.cluster  # type: ignore[attr-defined]  # its ranks are engines
    before = {rank: facts.pid for rank, facts in enumerate(cluster.facts)}
    ids = list(cluster.engine_ids)
    living = sorted(set(range(3)) - ranks)
    weights = {rank: weights_of(session, rank) for rank in living if rank not in bare}
    began = time.monotonic()
    said = session.recover()
    print(f"recovered in {time.monotonic() - began:.1f} s: {said}")
    assert set(map(int, re.findall(r"rank (\d) is started again", said))) == ranks, said
    assert cluster.engine_ids == ids
    after = {rank: facts.pid for rank, facts in enumerate(cluster.facts)}
    assert {rank for rank in range(3) if after[rank] != before[rank]} == ranks
    assert {rank: weights_of(session, rank) for rank in weights} == weights
    assert run.standing().remedy == RESTART
    run.restart()
    assert (run.standing().state, run.standing().message, run.standing().remedy) == ("paused", "", "")
    assert outcome(run) == wanted


def weights_of(session: Session, rank: int) -> int:
    """Which object holds them on that rank."""
    cluster = session.ranks.cluster  # type: ignore[attr-defined]  # its ranks are engines
    found: list[int] = cluster.call(rank, "builtins:eval", WEIGHTS, timeout=60)
    return found[0]


WEIGHTS = "id(__import__('dinfer.rank.kernel').rank.kernel._current.host.decoder)"


def trial(session: Session, wanted: Wanted, tmp_path: Path, seed: int) -> None:
    found = broken(session, tmp_path, seed)
    check_named(found)
    check_saved(found, tmp_path / "saved")
    check_recovered(session, found.run, {found.rank}, wanted)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (4, 8))])
def test_a_broken_rank_is_named_and_brought_back(
    session: Session, wanted: Wanted, tmp_path: Path, seed: int
) -> None:
    trial(session, wanted, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_any_rank_may_break_at_any_op(session: Session, wanted: Wanted, tmp_path: Path, seed: int) -> None:
    trial(session, wanted, tmp_path, seed)


@pytest.mark.slow
def test_two_at_once_of_which_one_is_rank_0(session: Session, wanted: Wanted) -> None:
    run = begin(session)
    run.step("layer", 5)
    for rank in (0, 2):
        os.kill(pid_of(session, rank), signal.SIGKILL)
    wait_for(lambda: run.failure, "they are named")
    assert re.match(r"rank [02] is gone", run.failure)
    wait_for(
        lambda: all(session.ranks.exits()[rank] is not None for rank in (0, 2)), "both are known to be gone"
    )
    check_recovered(session, run, {0, 2}, wanted)


@pytest.mark.slow
def test_a_rank_that_breaks_while_it_loads_again(
    session: Session, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(session)
    os.kill(pid_of(session, 0), signal.SIGKILL)
    os.kill(pid_of(session, 1), signal.SIGKILL)
    wait_for(lambda: run.failure, "they are named")
    load = Session._load

    def broken_load(self: Session, ranks: list[int]) -> None:
        os.kill(pid_of(session, 0), signal.SIGKILL)
        load(self, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_load", broken_load)
        with pytest.raises(RankFailed, match=r"rank 0 is gone: session.recover\(\) brings it back"):
            session.recover()
    check_recovered(session, run, {0}, wanted, bare=(1,))


def test_a_stopped_rank_that_goes_on_is_not_lost(session: Session, wanted: Wanted) -> None:
    run = begin(session)
    run.step("layer", 3)
    os.kill(pid_of(session, 1), signal.SIGSTOP)
    wait_for(lambda: run.silence, "it is named")
    assert run.standing().state == "lost"
    os.kill(pid_of(session, 1), signal.SIGCONT)
    wait_for(lambda: not run.standing().message, "it is heard again")
    assert (run.standing().state, run.standing().remedy) == ("paused", "")
    assert outcome(run) == wanted


def pid_of(session: Session, rank: int) -> int:
    pid: int = session.ranks.cluster.facts[rank].pid  # type: ignore[attr-defined]  # its ranks are engines
    return pid

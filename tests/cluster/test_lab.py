"""The fault lab on real engines: what is said of ranks that misbehave, and that nothing is said of slow ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dinfer.cluster.engines import EngineRanks
from dinfer.lab.cells import cells_of
from dinfer.lab.faults import Cell
from dinfer.lab.hosts import hosts
from dinfer.lab.lab import lab_session, run_cells, run_slowly
from dinfer.lab.score import Score
from dinfer.session.session import Session
from tests.support.hosted import needs_hosts
from tests.support.ipclusters import IPython, ipython, within

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SEED, QUICK_SEED = 0, 2
"""Of the latter the first three slow runs take 2 s each."""
ABOUT_MESSAGES = ("skip a send", "skip a recv", "reorder two", "wrong size", "duplicate", "another plan")
"""Other faults have real engines stuck, stopped and killed in test_hangs."""


@pytest.fixture(scope="module")
def session(daemonized: IPython) -> Iterator[Session]:
    with within(daemonized), lab_session(join=True) as made:
        yield made


def check(
    session: Session, count: int, faults: tuple[str, ...] = (), slow_runs: int = 0, seed: int = SEED
) -> None:
    cells = [cell for cell in cells_of(seed, count) if not faults or cell.fault in faults]
    score = Score(seed, len(cells))
    run_cells(session, cells, score, print)
    run_slowly(session, slow_runs, score, print)
    assert score.all_right, score.table()


def test_messages_that_go_wrong(session: Session) -> None:
    check(session, 17, ABOUT_MESSAGES)


@pytest.mark.slow
def test_slow_runs_raise_no_alarm(session: Session) -> None:
    check(session, 0, slow_runs=3, seed=QUICK_SEED)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_more_of_the_matrix(session: Session) -> None:
    check(session, 40)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_slow_runs_raise_no_alarm(session: Session) -> None:
    check(session, 0, slow_runs=200)


@pytest.mark.slow
@needs_hosts
def test_links_that_break_in_the_network(tmp_path: Path) -> None:
    """And a rank that dies on a host, comes back there."""
    cells = [
        Cell("link cut", 0, 1, 1, "ring", "lockstep"),
        Cell("slow link", 2, 4, 0, "ring", "pipelined"),
        Cell("SIGKILL", 1, 2, 1, "pairwise", "pipelined"),
        Cell("link cut", 1, 3, 2, "pairwise", "pipelined"),
    ]
    score = Score(SEED, len(cells))
    with ipython(tmp_path), hosts(3) as network, lab_session(network=network) as session:
        assert isinstance(session.ranks, EngineRanks)
        assert len({facts.network for facts in session.ranks.cluster.facts}) == 3
        run_cells(session, cells, score, print, network)
    assert score.all_right, score.table()

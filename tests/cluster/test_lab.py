"""The fault lab on real engines: what is said of ranks that misbehave, and that nothing is said of slow ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dinfer.session.lab.cells import cells_of
from dinfer.session.lab.lab import lab_session, run_cells, run_slowly
from dinfer.session.lab.score import Score
from dinfer.session.session import Session
from tests.cluster.ipclusters import ipython

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SEED, QUICK_SEED = 0, 2
"""Of the latter the first three slow runs take 2 s each."""
ABOUT_MESSAGES = ("skip a send", "skip a recv", "reorder two", "wrong size", "duplicate", "another plan")
"""Other faults have real engines stuck, stopped and killed in test_hangs."""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with ipython(tmp_path_factory.mktemp("lab")), lab_session() as made:
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

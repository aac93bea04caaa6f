"""The lab: starts a cluster, or joins one, runs cells with clean runs mixed in, and keeps the score."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from dinfer.engine.hosting.commands import Message
from dinfer.session.clusters.errors import ClusterError
from dinfer.session.connect import connect
from dinfer.session.lab.cells import SCHEDULES, STRATEGIES, N, graph_of
from dinfer.session.lab.expected import Cell
from dinfer.session.lab.orders import orders, slowed
from dinfer.session.lab.score import Score, told
from dinfer.session.lab.trial import try_cell, try_clean
from dinfer.session.session import Session

CLEAN_EVERY = 5
"""cells between two runs in which nothing is wrong"""
Say = Callable[[str], None]


def run_lab(cells: Sequence[Cell], score: Score, say: Say, *, slow_runs: int = 0, join: bool = False) -> None:
    """Run these cells and note each in `score` as soon as it is known, so that it can be kept whatever ends this; then
    so many runs that are slow, and move.

    `join`: use the cluster that runs. Raises ClusterError, and what a session raises where ranks do not come back.
    """
    with lab_session(join=join) as session:
        say(session.ranks.describe())
        run_cells(session, cells, score, say)
        run_slowly(session, slow_runs, score, say)


def run_cells(session: Session, cells: Sequence[Cell], score: Score, say: Say) -> None:
    """The same in a session that holds the demo model."""
    began = time.monotonic()
    for number, cell in enumerate(cells):
        if number % CLEAN_EVERY == 0:
            _clean(session, number // CLEAN_EVERY, score, say)
        found = try_cell(session, cell)
        score.results.append(found)
        mark = "ok   " if found.correct else "WRONG"
        minutes = (time.monotonic() - began) / 60
        say(
            f"{number + 1}/{len(cells)} {mark} {told(found)}; recovered in {found.recovered_s:.1f} s; {minutes:.1f} min"
        )


def run_slowly(session: Session, count: int, score: Score, say: Say) -> None:
    """So many runs whose layers are slow, each otherwise; each counts as one in which nothing is wrong."""
    for number in range(count):
        _clean(session, number, score, say, slowed(score.seed + number, N))
        say(f"slow run {number + 1}/{count}; false alarms so far: {len(score.alarms)}")


def _clean(
    session: Session, number: int, score: Score, say: Say, given: dict[int, list[Message]] | None = None
) -> None:
    """Every plan in turn."""
    strategy, schedule = STRATEGIES[number % 2], SCHEDULES[number // 2 % 2]
    alarm = try_clean(session, strategy, schedule, given or orders(graph_of(strategy, schedule), None))
    score.clean_runs += 1
    if alarm:
        score.alarms.append(alarm)
        say(f"FALSE ALARM of a clean run: {alarm}")


@contextmanager
def lab_session(*, join: bool = False) -> Iterator[Session]:
    session = connect("ipyparallel", N, start=not join)
    try:
        session.load("demo", threads=1)
        yield session
    finally:
        with suppress(ClusterError):
            session.close()

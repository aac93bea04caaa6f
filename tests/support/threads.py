"""Sessions whose ranks are threads of the test's process. Not a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinfer.cluster.threads import LocalRanks
from dinfer.plan.cut import Cuts
from dinfer.run.run import Run
from dinfer.session.session import Session


@contextmanager
def session_on_threads(world_size: int, model: Path, **load: Any) -> Iterator[Session]:
    """A session with a checkpoint loaded, with these arguments of `session.load`; closed afterwards."""
    with Session(LocalRanks(world_size)) as session:
        yield session.load(str(model), threads=1, **load)


def engines(session: Session) -> list[object]:
    """Each rank's engine of the current run."""
    assert isinstance(session.ranks, LocalRanks)
    return [host.engine for host in session.ranks.hosts]


def stands_at_a_cut(run: Run) -> bool:
    """Whether no lane moves, and what has been done makes a consistent cut."""
    standing = run.standing()
    cut = tuple(stand.positions for stand in standing.stands)
    return standing.state in ("paused", "done") and Cuts(run.plan).is_consistent(cut)

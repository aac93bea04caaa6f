"""A session on threads that the tests of this folder share, and a run of it that was saved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.saved_runs import PROMPT, done
from tests.support.threads import session_on_threads
from tests.support.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Three ranks; stages of 2, 1 and 1 layers."""
    model = tiny_checkpoint(tmp_path_factory.mktemp("saved") / "model", layers=4, tokenizer=True)
    with session_on_threads(3, model) as session:
        yield session


@pytest.fixture
def run(session: Session) -> Run:
    """37 tokens in 5 chunks, prefill done, and 4 new tokens."""
    found = done(session)
    found.decode(4)
    return found


@pytest.fixture(scope="module")
def kept(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved run, to be copied."""
    run = session.prefill(PROMPT, chunk_size=8)
    run.decode(4)
    return run.save(tmp_path_factory.mktemp("kept") / "kept")


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(kept, tmp_path / "copy")

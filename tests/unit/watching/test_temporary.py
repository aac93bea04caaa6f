"""Folders that nobody has named: they go once whoever watches is done and the job is over."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dinfer.watching.temporary import LOCK, PREFIX, TemporaryFolder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def record(folder: Path, pid: int) -> None:
    """A process writes there."""
    (folder / "records").mkdir()
    (folder / "records" / f"some-host-{pid}.jsonl").touch()


def test_a_folder_goes_with_its_watch(elsewhere: Path) -> None:
    folder = TemporaryFolder()
    record(folder.path, ended())
    assert folder.path.name.startswith(PREFIX)
    del folder
    assert list(elsewhere.iterdir()) == []


def test_a_folder_stays_while_its_job_runs_and_goes_with_a_later_watch(elsewhere: Path) -> None:
    folder = TemporaryFolder()
    path = folder.path
    record(path, os.getpid())
    del folder
    assert path.is_dir()
    (path / "records" / f"some-host-{os.getpid()}.jsonl").rename(
        path / "records" / f"some-host-{ended()}-2.jsonl"
    )
    later = TemporaryFolder()
    assert list(elsewhere.iterdir()) == [later.path]


def test_the_folder_of_a_watch_that_goes_on_stays() -> None:
    first = TemporaryFolder()
    second = TemporaryFolder()
    assert first.path.is_dir()
    assert second.path.is_dir()


def test_what_a_killed_watch_has_left_goes_and_what_others_have_made_stays(elsewhere: Path) -> None:
    left, of_others = elsewhere / f"{PREFIX}left", elsewhere / f"{PREFIX}of-others"
    left.mkdir()
    (left / LOCK).touch()
    of_others.mkdir()
    later = TemporaryFolder()
    assert sorted(elsewhere.iterdir()) == sorted([of_others, later.path])

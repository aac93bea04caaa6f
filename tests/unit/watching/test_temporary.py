"""Folders that nobody has named: they go once whoever watches is done and the job is over."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dinfer.temporary import LOCK
from dinfer.watch.probe.writing import host_in_names
from dinfer.watching.temporary import PREFIX, TemporaryFolder, is_job_over


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
    (folder / "records" / f"{host_in_names()}-{pid}.jsonl").touch()


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
    (path / "records" / f"{host_in_names()}-{os.getpid()}.jsonl").rename(
        path / "records" / f"{host_in_names()}-{ended()}-2.jsonl"
    )
    later = TemporaryFolder()
    assert list(elsewhere.iterdir()) == [later.path]


@pytest.mark.parametrize("host", ["worker-0", "ip-10-0-0-12", "a b"])
def test_the_name_of_a_host_may_end_in_a_number(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    folder = TemporaryFolder()
    path = folder.path
    record(path, os.getpid())
    assert not is_job_over(path)
    (path / "records" / f"{host_in_names()}-{os.getpid()}.jsonl").rename(
        path / "records" / f"elsewhere-{os.getpid()}.jsonl"
    )
    assert is_job_over(path)


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

"""A log on a full disk: no traceback for each record, no end of the run, and one line at the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dinfer.config import Config
from dinfer.rank.logs import LATEST, LogFile, log_trouble, make_log_folder, new_run_folder

Open = Callable[[Path], logging.Logger]
FULL = Path("/dev/full")


@pytest.fixture
def opened() -> Iterator[Open]:
    """opened(path): a logger with that file; closed with the test."""
    log = logging.Logger("test", logging.DEBUG)

    def add(path: Path) -> logging.Logger:
        log.addHandler(LogFile(path))
        return log

    yield add
    for handler in log.handlers:
        handler.close()


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_is_told_once_at_the_end(opened: Open, capsys: pytest.CaptureFixture[str]) -> None:
    log = opened(FULL)
    for number in range(3):
        log.info("record %d", number)
    assert log_trouble(log) == "3 records could not be written to /dev/full: No space left on device"
    assert capsys.readouterr() == ("", "")


def test_a_file_that_cannot_be_opened_is_told_too(
    opened: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = opened(tmp_path / "gone" / "rank0.log")
    log.info("lost")
    assert log_trouble(log).startswith("1 records could not be written to ")
    assert log_trouble(log).endswith("rank0.log: No such file or directory")
    assert capsys.readouterr() == ("", "")


def test_a_log_that_is_written_has_no_trouble(opened: Open, tmp_path: Path) -> None:
    log = opened(tmp_path / "rank0.log")
    log.info("深い所")
    assert (tmp_path / "rank0.log").read_text(encoding="utf-8") == "深い所\n"
    assert log_trouble(log) == ""


def test_a_record_that_cannot_be_made_is_a_mistake_and_shown(
    opened: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = opened(tmp_path / "rank0.log")
    log.info("%d", "no number")
    assert "Logging error" in capsys.readouterr().err
    assert log_trouble(log) == ""


def test_the_default_folder_ignores_itself_in_git_and_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (Path(Config.log_dir), Path("elsewhere/logs")):
        make_log_folder(folder)
        make_log_folder(folder)
    assert Path(Config.log_dir, ".gitignore").read_text(encoding="utf-8") == "*\n"
    assert list(Path("elsewhere/logs").iterdir()) == []


def test_each_run_gets_a_folder_and_the_newest_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log_dir = Path(Config.log_dir)
    made = [new_run_folder(log_dir) for _ in range(3)]  # in one second, most likely
    assert len(set(made)) == 3
    assert all(folder.is_dir() and folder.parent == log_dir for folder in made)
    assert Path(os.readlink(log_dir / LATEST)) == Path(made[-1].name)
    assert {path.name for path in log_dir.iterdir()} == {
        ".gitignore",
        LATEST,
        *(folder.name for folder in made),
    }


def test_a_folder_of_the_user_is_no_link(tmp_path: Path) -> None:
    (tmp_path / LATEST / "mine").mkdir(parents=True)
    made = new_run_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {LATEST, made.name}
    assert (tmp_path / LATEST / "mine").is_dir()


def test_without_links_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    made = new_run_folder(tmp_path)
    assert list(tmp_path.iterdir()) == [made]

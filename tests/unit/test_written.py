"""Whatever a user has written: the folders above it are made, and a path that leads through a file is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dinfer
from dinfer.cli.root import keep_json
from dinfer.files import FolderError, check_folder, make_folder
from dinfer.run.run import Run
from tests.support.traces import PROMPT


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with dinfer.connect("threads", 2) as session:
        run = session.load("demo", threads=1).prefill(PROMPT, chunk_size=8)
        run.wait(60)
        yield run


WRITES: dict[str, Callable[[Run, Path], object]] = {
    "a report": lambda run, path: run.report(path),
    "a saved run": lambda run, path: run.save(path),
    "a trace": lambda run, path: run.trace.export("jsonl", path),
    "a figure": lambda run, path: run.trace.lanes().save(path),
}


@pytest.mark.parametrize("what", WRITES)
def test_the_folders_above_are_made(run: Run, tmp_path: Path, what: str) -> None:
    target = tmp_path / "new" / "newer" / "x.html"
    assert str(WRITES[what](run, target)) == str(target)
    assert target.exists()


@pytest.mark.parametrize("what", WRITES)
def test_a_path_through_a_file_is_refused_in_words(run: Run, tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Exception, match=r"file.*(is no folder|so no folder can be made)"):
        WRITES[what](run, tmp_path / "file" / "new" / "x.html")
    assert (tmp_path / "file").read_text() == "mine"


def test_json_of_a_command_goes_into_a_new_folder(tmp_path: Path) -> None:
    keep_json({"figure": 1}, str(tmp_path / "new" / "x.json"))
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"figure": 1}


def test_a_check_makes_nothing(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "newer" / "x")
    assert list(tmp_path.iterdir()) == []
    assert make_folder(tmp_path / "new" / "newer" / "x").parent.is_dir()


def test_the_error_is_one_of_files_and_says_why_without_a_number(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"^'{tmp_path}/file' is no folder") as raised:
        check_folder(tmp_path / "file" / "x")
    assert isinstance(raised.value, FolderError)

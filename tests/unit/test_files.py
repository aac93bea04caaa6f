"""Names of what a run writes: nothing replaces what another run, or the user, has put there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import dinfer
from dinfer.errors import NotPossible
from dinfer.files import (
    FileError,
    FolderError,
    WrittenFiles,
    as_json,
    check_working_folder,
    free_path,
    make_folder,
    read_bytes,
)


def test_the_first_free_name_is_taken(tmp_path: Path) -> None:
    wanted = tmp_path / "report.html"
    assert free_path(wanted) == wanted
    wanted.touch()
    assert free_path(wanted) == wanted  # an empty file, as mktemp makes it
    wanted.write_text("a", encoding="utf-8")
    assert free_path(wanted) == tmp_path / "report-2.html"
    (tmp_path / "report-2.html").write_text("b", encoding="utf-8")
    assert free_path(wanted) == tmp_path / "report-3.html"


def test_a_folder_keeps_its_whole_name(tmp_path: Path) -> None:
    wanted = tmp_path / "run.v1"
    wanted.mkdir()
    assert free_path(wanted) == wanted
    (wanted / "a").touch()
    assert free_path(wanted) == tmp_path / "run.v1-2"


def test_a_run_replaces_its_own_file_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.html"
    first, second = WrittenFiles(), WrittenFiles()

    def write(run: WrittenFiles, text: str) -> Path:
        target = run.place_for(path)
        target.write_text(text, encoding="utf-8")
        run.add(path, target)
        return target

    assert write(first, "1") == write(first, "1 again") == path
    assert capsys.readouterr().out == ""
    assert write(second, "2") == tmp_path / "report-2.html"
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "report.html" in said
    assert "report-2.html" in said
    assert write(second, "2 again") == tmp_path / "report-2.html"
    assert write(first, "1 once more") == path
    assert capsys.readouterr().out == ""
    path.write_text("mine, and longer", encoding="utf-8")
    os.utime(path, ns=(1, 1))  # another time than that of the run's own, however coarse the clock
    assert write(first, "1 at last") == tmp_path / "report-3.html"
    assert path.read_text(encoding="utf-8") == "mine, and longer"


def test_what_is_too_large_or_no_json_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(FileError, match="more than 4 bytes"):
        read_bytes(tmp_path / "a", 4)
    for text in (b"NaN", b"[Infinity]", b"{", b"[" * 100_000, b"9" * 5000, b"\xff"):
        with pytest.raises(FileError):
            as_json(text)
    assert as_json(b'\xef\xbb\xbf{"a": [1.5]}') == {"a": [1.5]}


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"is a folder, and a file is to be written: add its name"):
        make_folder(tmp_path)
    assert make_folder(tmp_path / "new" / "file") == tmp_path / "new" / "file"


def test_a_working_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_working_folder()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(NotPossible, match="working folder"):
        check_working_folder()
    with pytest.raises(NotPossible, match="working folder"):
        dinfer.connect("threads", n=1)

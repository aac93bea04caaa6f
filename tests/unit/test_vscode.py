"""`dinfer vscode`: entries are written into a folder's launch.json, and whatever else is in it stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dinfer.cli import app
from dinfer.cli.vscode import ALL_RANKS, launch_file

ROOT = Path(__file__).parents[2]


def vscode(folder: Path, *more: str) -> Result:
    return CliRunner().invoke(app, ["vscode", "--folder", str(folder), *more])


def read(folder: Path) -> dict[str, Any]:
    text = (folder / ".vscode" / "launch.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def written(folder: Path, text: str) -> Path:
    path = folder / ".vscode" / "launch.json"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_without_the_file_gets_it(tmp_path: Path) -> None:
    answer = vscode(tmp_path)
    assert answer.exit_code == 0
    assert str(tmp_path / ".vscode" / "launch.json") in answer.stdout
    assert ALL_RANKS in answer.stdout
    assert read(tmp_path) == launch_file()


def test_entries_of_the_user_stay_and_own_ones_are_replaced_in_place(tmp_path: Path) -> None:
    mine, stale = {"name": "Mine", "type": "debugpy", "程序": "我的"}, {"name": "Rank 1", "type": "old"}
    inputs = [{"id": "which", "type": "promptString"}]
    written(tmp_path, json.dumps({"inputs": inputs, "configurations": [stale, mine, {"type": "nameless"}]}))
    assert vscode(tmp_path).exit_code == 0
    found = read(tmp_path)
    assert found["inputs"] == inputs
    assert found["configurations"][1:3] == [mine, {"type": "nameless"}]
    assert found["configurations"][0]["env"]["RANK"] == "1"
    names = [entry["name"] for entry in found["configurations"] if "name" in entry]
    assert sorted(names) == sorted(["Mine", *(entry["name"] for entry in launch_file()["configurations"])])
    assert vscode(tmp_path).exit_code == 0
    assert read(tmp_path) == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n  // my own\n  "configurations": []\n}', ["line 2", "comments", "remove them", "--folder"]),
        ('{"configurations": [],}', ["not plain JSON", "trailing commas", "remove them"]),
        ("[]", ["not a JSON object"]),
        ('{"compounds": {}}', ["compounds", "not a list"]),
    ],
)
def test_a_file_that_would_lose_something_is_left_as_it_is(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    path = written(tmp_path, text)
    answer = vscode(tmp_path)
    assert answer.exit_code == 2
    assert path.read_text(encoding="utf-8") == text
    for word in [str(path), *words]:
        assert word in answer.stderr


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    answer = vscode(tmp_path / "none")
    assert answer.exit_code == 2
    assert "--folder" in answer.stderr


def test_where_its_folder_is_a_file_that_is_said(tmp_path: Path) -> None:
    (tmp_path / ".vscode").touch()
    answer = vscode(tmp_path)
    assert answer.exit_code == 1
    assert "Not a directory" in answer.stderr


def test_entries_name_nothing_that_an_installed_wheel_lacks() -> None:
    assert "env/" not in json.dumps({**launch_file(), "configurations": [
        {key: value for key, value in entry.items() if key != "env"} for entry in launch_file()["configurations"]
    ]})  # fmt: skip


def test_the_repositorys_own_file_is_what_the_command_writes() -> None:
    assert read(ROOT) == launch_file("env/run.example.toml")

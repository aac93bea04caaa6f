"""`dinfer vscode`: entries are written into a folder's launch.json, whatever else is in it stays; the extension."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from dinfer.cli import app
from dinfer.cli.vscode import ALL_RANKS, ATTACH_TO_RUN, DEBUG_RUN, dinfer_entries, launch_file
from dinfer.cli.vscode_extension import EDITORS, package
from dinfer.config import ConfigError
from dinfer.dap.arguments import attach_arguments, launch_arguments
from dinfer.dap.listing import SUFFIX

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


def test_a_file_whose_run_is_chosen_is_taken(tmp_path: Path) -> None:
    """As `dinfer run` and `dinfer dap` take it, which the entries start."""
    toml = tmp_path / "run.toml"
    toml.write_text('schedule = "auto"\nchunk_size = "auto"\nlayer_split = "auto"\n', encoding="utf-8")
    answer = vscode(tmp_path, "--config", "run.toml")
    assert answer.exit_code == 0, answer.stderr
    toml.write_text('schedule = "auto"\nchunk_size = 0\n', encoding="utf-8")
    answer = vscode(tmp_path, "--config", "run.toml")
    assert (answer.exit_code, "chunk_size is 0" in answer.stderr) == (2, True), answer.stderr


def test_the_repositorys_own_file_is_what_the_command_writes() -> None:
    assert read(ROOT) == launch_file("env/run.example.toml")


# -- the entries of `dinfer dap`, and the extension that brings their type


def test_entries_of_dap_are_what_it_takes() -> None:
    launch, attach = dinfer_entries()
    assert [launch["name"], attach["name"]] == [DEBUG_RUN, ATTACH_TO_RUN]
    given = launch_arguments(launch)
    assert (given.model, given.ranks, given.where) == ("demo", 3, "ipyparallel")
    assert given.of_prefill["chunk_size"] == 8
    assert attach_arguments(attach).take
    from_file = launch_arguments({**dinfer_entries("env/run.example.toml")[0], "cwd": str(ROOT)})
    assert (from_file.prompt, from_file.ranks) == (given.prompt, 3)
    with pytest.raises(ConfigError, match=r"config file .* cannot be read"):
        launch_arguments({**dinfer_entries("none.toml")[0], "cwd": str(ROOT)})


def test_the_extension_starts_this_python_and_knows_every_argument() -> None:
    about = package()
    assert "main" not in about  # no code: VS Code itself starts the adapter
    debugger = about["contributes"]["debuggers"][0]
    assert [debugger["program"], *debugger["args"]] == [sys.executable, "-m", "dinfer", "dap"]
    assert Path(debugger["program"]).is_absolute()  # VS Code takes another path for one in the extension
    entries = {entry["request"]: entry for entry in dinfer_entries()}
    for request, schema in debugger["configurationAttributes"].items():
        of_vscode = {"name", "type", "request", "presentation"}
        assert entries[request].keys() - of_vscode <= schema["properties"].keys() | {"cwd"}
    languages = about["contributes"]["languages"]
    assert [one["language"] for one in about["contributes"]["breakpoints"]] == [languages[0]["id"]]
    assert languages[0]["extensions"] == [SUFFIX]
    assert re.fullmatch(r"\d+\.\d+\.\d+", about["version"])


def test_the_extension_is_a_vsix_file(tmp_path: Path) -> None:
    answer = vscode(tmp_path, "--extension", str(tmp_path / "new" / "dinfer.vsix"))
    assert answer.exit_code == 0
    assert "Install from VSIX" in answer.stdout
    with zipfile.ZipFile(tmp_path / "new" / "dinfer.vsix") as archive:
        assert json.loads(archive.read("extension/package.json")) == package()
        manifest = ElementTree.fromstring(archive.read("extension.vsixmanifest"))
        ElementTree.fromstring(archive.read("[Content_Types].xml"))
    identity = next(one for one in manifest.iter() if one.tag.endswith("Identity"))
    assert (identity.get("Publisher"), identity.get("Id")) == (package()["publisher"], package()["name"])


def test_vs_codes_own_command_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / EDITORS[0]
    code.write_text('#!/bin/sh\necho "$@" > "$0.said"\ntest -s "$2"\n', encoding="utf-8")
    code.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    answer = vscode(tmp_path, "--install")
    assert answer.exit_code == 0, answer.stderr
    assert "has installed the extension dinfer.dinfer-debug" in answer.stdout
    said = (tmp_path / f"{EDITORS[0]}.said").read_text(encoding="utf-8").split()
    assert (said[0], said[2]) == ("--install-extension", "--force")
    code.write_text("#!/bin/sh\necho no such option >&2\nexit 3\n", encoding="utf-8")
    answer = vscode(tmp_path, "--install")
    assert answer.exit_code == 1
    assert "no such option" in answer.stderr
    code.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = vscode(tmp_path, "--install")
    assert answer.exit_code == 1
    assert "--extension dinfer.vsix" in answer.stderr

"""Saved runs that others have damaged or made: opened, or refused with one error, within seconds and 500 MB."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dinfer
from dinfer.run.run import Run
from dinfer.saved.about import read_about
from dinfer.saved.format import SavedError
from dinfer.saved.read import read_record, read_source
from dinfer.session.session import Session
from tests.support.hostile import LIMITED, mutated_bytes, mutated_json, read_limited, read_or_refused
from tests.support.saved_runs import FILES, decoded

MODEL = {"layers": 4, "tokenizer": True}

several = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def run(session: Session) -> Run:
    return decoded(session)


@pytest.fixture(scope="module")
def folder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, saved, without the checksums that would find every damage."""
    made = run.save(tmp_path_factory.mktemp("saved") / "run")
    about = json.loads((made / "run.json").read_text(encoding="utf-8"))
    (made / "run.json").write_text(json.dumps({**about, "files": {}}), encoding="utf-8")
    return made


@contextmanager
def damaged(path: Path, data: bytes) -> Iterator[None]:
    """The file holds something else for a while."""
    right = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(right)


def read_all(folder: Path) -> None:
    """Everything that can be read of a folder."""
    saved = dinfer.open(folder)
    str(saved)
    saved.verdict()
    str(saved.diff())
    for rank in saved.source().ranks:
        for layer in range(saved.plan.shape.layers):
            _ = saved.kv(layer=layer, rank=rank).k[:]
        saved.hidden(rank=rank, chunk=0)
    about = read_about(folder)
    for rank in about.own:
        read_record(folder, about, read_source(folder, about), rank, "")


def test_the_whole_folder_is_read(folder: Path) -> None:
    read_all(folder)


@several
@given(st.data())
def test_a_damaged_run_json_is_refused_or_read(folder: Path, data: st.DataObject) -> None:
    path = folder / "run.json"
    right = path.read_bytes()
    as_values = mutated_json(json.loads(right)).map(lambda value: json.dumps(value).encode())
    with damaged(path, data.draw(as_values | mutated_bytes(right))):
        read_or_refused(lambda: read_all(folder))


@several
@given(st.data())
def test_another_damaged_file_is_refused_or_read(folder: Path, data: st.DataObject) -> None:
    path = folder / data.draw(st.sampled_from(FILES))
    right = path.read_bytes()
    with damaged(
        path, data.draw(_mutated_tensors(right) if path.suffix == ".safetensors" else mutated_bytes(right))
    ):
        read_or_refused(lambda: read_all(folder))


def _mutated_tensors(data: bytes) -> st.SearchStrategy[bytes]:
    """With another header, or other bytes."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    headers = mutated_json(json.loads(data[8:end])).map(json.dumps).map(str.encode)
    return headers.map(lambda text: struct.pack("<Q", len(text)) + text + data[end:]) | mutated_bytes(data)


@pytest.mark.parametrize("name", [*FILES, "run.json"])
@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to("/etc/passwd"),
    ],
    ids=["folder", "pipe", "endless", "itself", "nowhere", "elsewhere"],
)
def test_what_is_no_file_of_the_run_is_refused(
    folder: Path, tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).unlink()
    make(copy / name)
    with pytest.raises(SavedError, match=name):
        read_all(copy)


@pytest.mark.parametrize("path", ["a" * 5000, "~no such user/run"])
def test_a_path_that_there_cannot_be(path: str) -> None:
    with pytest.raises(SavedError, match="cannot be opened"):
        dinfer.open(path)


def test_a_link_to_the_right_file_is_followed(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in FILES:
        (copy / name).unlink()
        (copy / name).symlink_to(folder / name)
    read_all(copy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"standing": ["", ""]}, "2 standing, and should have 3"),
        ({"ranks": [{"rank": 3, "spans": [5] * 4, "rows": [37] * 4}]}, "ranks with 3; the largest is 2"),
        ({"ranks": [{"rank": 0, "spans": [9] * 4, "rows": [37] * 4}]}, "spans of rank 0 with 9"),
        ({"ranks": [{"rank": 0, "spans": [5] * 4, "rows": [10**12] * 4}]}, "digests.safetensors"),
        (
            {"ranks": [{"rank": 0, "spans": [5] * 3, "rows": [37] * 4}]},
            "3 spans of rank 0, and should have 4",
        ),
        ({"ids": [-1] * 37}, "$.ids"),
        ({"ids": [1.5] * 37}, "$.ids"),
        ({"ids": ["1"] * 37}, "$.ids"),
        ({"positions": [[10**9]] * 3}, "positions of rank 0"),
    ],
)
def test_numbers_that_do_not_fit_are_named(folder: Path, changes: dict[str, Any], words: str) -> None:
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    with (
        damaged(folder / "run.json", json.dumps({**about, **changes}).encode()),
        pytest.raises(SavedError) as caught,
    ):
        read_all(folder)
    assert words in str(caught.value)
    assert "run.json" in str(caught.value) or "digests" in words


@LIMITED
@pytest.mark.timeout(300)
def test_a_hostile_folder_costs_little(folder: Path, tmp_path: Path) -> None:
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    plan = (folder / "plan.txt").read_text(encoding="utf-8")
    texts = {
        "nested": b"[" * 5_000_000,
        "nested in a field": b'{"format": "dinfer-run", "version": 1, "own": ' + b'{"a":' * 3_000_000,
        "lists": b'{"format": "dinfer-run", "version": 1, "ids": [' + b"[]," * 10_000_000 + b"0]}",
        "unknown": b'{"format": "dinfer-run", "version": 1, "other": [' + b"[]," * 10_000_000 + b"0]}",
        "digits": json.dumps({**about, "ids": 0}).replace('"ids": 0', f'"ids": {"9" * 1_000_000}').encode(),
        "large": b" " * (70 << 20),
    }
    paths = []
    for name, text in texts.items():
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / "run.json").write_bytes(text)
        paths.append(copy)
    for name, change in {
        "layers": ("layers 4", "layers 1000000000"),
        "tokens": ("tokens 37", "tokens 1000000"),
    }.items():
        copy = shutil.copytree(folder, tmp_path / name)
        assert change[0] in plan
        (copy / "plan.txt").write_text(plan.replace(*change), encoding="utf-8")
        paths.append(copy)
    for name, length in {"header": 1 << 62, "longer": 90_000_000}.items():
        copy = shutil.copytree(folder, tmp_path / name)
        with (copy / "digests.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(100_000_000)
        paths.append(copy)
    found = read_limited("import dinfer, dinfer.saved.saved", "dinfer.open(path)", paths)
    assert found.keys() == {path.name for path in paths}
    assert all(said.startswith("SavedError: ") for said in found.values()), found

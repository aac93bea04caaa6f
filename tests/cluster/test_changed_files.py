"""A checkpoint's files are written to while a run stands half-way on engines, which compute with the files themselves:
nothing is computed with what was not loaded, and nobody is lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dinfer
from dinfer.errors import ModelError
from dinfer.run.failure import RankFailed
from dinfer.session.session import Session
from dinfer.views.panel.panel import Panel
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

pytestmark = pytest.mark.cluster
SLOW = pytest.mark.slow

WEIGHTS = "model.safetensors"
IDS = tuple(prompt(22))
Change = Callable[[Path, Path], None]


@pytest.fixture
def folder(session: Session, model: Path, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of this test; then the session has its own again."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    session.load(str(folder), threads=1)
    yield folder
    session.load(str(model), threads=1)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "other", layers=9, seed=1)


def trained_further(folder: Path, _: Path) -> None:
    """Other values in the same file, in which nothing else has changed."""
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.seek(-4096, os.SEEK_END)
        stream.write(b"\x01" * 4096)


def with_more_layers(folder: Path, other: Path) -> None:
    for name in (WEIGHTS, "config.json"):
        shutil.copyfile(other / name, folder / name)


def shortened(folder: Path, _: Path) -> None:
    os.truncate(folder / WEIGHTS, 2000)


@pytest.mark.parametrize(
    "change",
    [trained_further, pytest.param(with_more_layers, marks=SLOW), pytest.param(shortened, marks=SLOW)],
)
def test_a_run_that_stands_half_way_never_computes_with_other_bytes(
    session: Session, folder: Path, other: Path, change: Change, tmp_path: Path
) -> None:
    run = session.prefill(IDS, chunk_size=4, max_new_tokens=4, paused=True)
    run.run_to(chunk=1, layer=3)
    processes = session.ranks.identities()
    before = run.kv().diff()
    change(folder, other)
    with pytest.raises(RankFailed, match=r"were overwritten after they were loaded.*session\.load\("):
        run.step("layer")
    assert run.standing().state == "failed"
    assert run.standing().remedy == f"session.load({str(folder)!r}, threads=1)"
    assert before.equal
    assert run.kv().diff().equal, "what was computed stays"
    with pytest.raises(RankFailed, match="were overwritten"):
        run.compare("reference")
    assert dinfer.open(run.save(tmp_path / "saved")).kv().diff(run).equal
    with pytest.raises(ModelError, match="has changed since it was loaded"):
        session.prefill(IDS)
    assert session.ranks.identities() == processes, "no process was lost"


@pytest.mark.parametrize("change", [pytest.param(trained_further, marks=SLOW), with_more_layers])
def test_it_is_loaded_again_on_all_ranks(session: Session, folder: Path, other: Path, change: Change) -> None:
    run = session.prefill(IDS, chunk_size=4, max_new_tokens=4, paused=True)
    run.run_to(chunk=1, layer=3)
    change(folder, other)
    session.load(str(folder), threads=1)
    run = session.prefill(IDS, chunk_size=4, max_new_tokens=4)
    run.wait(60)
    run.decode()
    assert run.kv().diff().equal
    assert run.compare("reference").equal


def test_the_button_of_a_run_that_failed_so_loads_what_is_there_now(
    session: Session, folder: Path, other: Path
) -> None:
    run = session.prefill(IDS, chunk_size=4, max_new_tokens=4, paused=True)
    run.run_to(chunk=1, layer=3)
    trained_further(folder, other)
    with pytest.raises(RankFailed, match=r"to go on: session\.load\("):
        run.step("layer")
    panel = Panel(run)
    assert panel.shown["mend"] == "load again"
    panel.close()
    run.mend()
    assert run.standing().over.startswith("a checkpoint was loaded since")
    again = session.prefill(IDS, chunk_size=4, max_new_tokens=4)
    again.wait(60)
    assert again.compare("reference").equal


def test_bytes_that_are_back_are_loaded_anew(session: Session, folder: Path, model: Path) -> None:
    """The folder is as it was loaded, and the file that ranks have mapped is not."""
    shortened(folder, folder)
    (folder / WEIGHTS).unlink()
    shutil.copyfile(model / WEIGHTS, folder / WEIGHTS)
    session.load(str(folder), threads=1)
    run = session.prefill(IDS, chunk_size=4, max_new_tokens=4)
    run.wait(60)
    assert run.compare("reference").equal


@SLOW
def test_a_moved_file_leaves_the_run_as_it_is(session: Session, folder: Path, other: Path) -> None:
    run = session.prefill(IDS, chunk_size=4, max_new_tokens=4)
    run.wait(60)
    run.decode()
    tokens = run.tokens
    run.restart()
    run.run_to(chunk=1, layer=3)
    os.replace(other / WEIGHTS, folder / WEIGHTS)
    run.decode()
    assert run.tokens == tokens

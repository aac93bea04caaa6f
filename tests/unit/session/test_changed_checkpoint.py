"""A checkpoint's folder that changes after it was loaded: what counts is what the ranks have, and nobody is misled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dinfer.cluster.ranks import LOST, RankRefused
from dinfer.errors import ModelError
from dinfer.messages import LoadModel
from dinfer.model.checkpoint import check
from dinfer.model.decoder import Decoder
from tests.support.reference import generate
from tests.support.runs import wait_for
from tests.support.threads import session_on_threads
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

IDS = prompt(12)
WEIGHTS = "model.safetensors"


def trained_further(folder: Path, other: Path) -> None:
    shutil.copyfile(other / WEIGHTS, folder / WEIGHTS)


def edited(folder: Path, _: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))


def shortened(folder: Path, _: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.truncate(2000)


def overwritten(folder: Path, _: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 3000)


def removed(folder: Path, _: Path) -> None:
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize("change", [trained_further, edited, shortened, overwritten, removed])
def test_a_changed_folder_is_refused_until_it_is_loaded_again(
    folder: Path, other: Path, change: Callable[[Path, Path], None]
) -> None:
    with session_on_threads(1, folder) as session:
        run = session.prefill(IDS, chunk_size=4, max_new_tokens=4)
        run.wait(60)
        change(folder, other)
        assert len(run.decode().tokens) == 4, "the weights in memory are as they were"
        with pytest.raises(ModelError, match=r"has changed since it was loaded.*"):
            run.compare("reference")
        with pytest.raises(ModelError, match=r"has changed since it was loaded"):
            session.prefill(IDS)


@pytest.mark.parametrize(("change", "is_said"), [(shortened, True), (None, False)])
def test_a_rank_that_is_lost_once_the_folder_has_changed_says_so(
    folder: Path, other: Path, change: Callable[[Path, Path], None] | None, is_said: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As one that has mapped a file that is shorter now: the system ends it without a word."""
    with session_on_threads(1, folder) as session:
        run = session.prefill(IDS, chunk_size=4, paused=True)
        if change:
            change(folder, other)
        monkeypatch.setattr(session.ranks, "exits", lambda: [LOST])
        session.ranks.ranks[0].gone = True
        wait_for(lambda: run.failure, "the run has failed")
        assert "rank 0 is gone" in run.failure
        assert ("has changed since it was loaded" in run.failure) is is_said
        monkeypatch.undo()


@pytest.mark.parametrize("change", [trained_further, edited])
def test_loading_the_same_folder_again_takes_what_is_there_now(
    folder: Path, other: Path, change: Callable[[Path, Path], None]
) -> None:
    with session_on_threads(1, folder) as session:
        before = session.prefill(IDS, chunk_size=4)
        before.wait(60)
        first = before.decode(8).tokens
        assert list(first) == generate(Decoder.load(folder), IDS, 8)
        change(folder, other)
        session.load(str(folder), threads=1)
        run = session.prefill(IDS, chunk_size=4)
        run.wait(60)
        assert list(run.decode(8).tokens) == generate(Decoder.load(folder), IDS, 8)
        assert run.compare("reference").equal
        assert run.job.spec.fingerprint != before.job.spec.fingerprint


def test_weights_stay_where_nothing_has_changed(folder: Path) -> None:
    with session_on_threads(2, tiny_checkpoint(folder.parent / "two", layers=2)) as session:
        decoders = [host.weights.decoder for host in session.ranks.hosts]  # type: ignore[attr-defined]
        session.load(str(folder.parent / "two"), threads=1)
        assert [host.weights.decoder for host in session.ranks.hosts] == decoders  # type: ignore[attr-defined]


def test_a_rank_that_finds_other_files_than_the_session_says_so(folder: Path, other: Path) -> None:
    """As on another host, or where a lost rank comes back after the files have changed."""
    with session_on_threads(1, folder) as session:
        command = LoadModel(str(folder), "auto", "cpu", check(other).fingerprint, 1)
        with pytest.raises(RankRefused, match=r"holds another checkpoint here .* than the session has read"):
            session.ranks.ask({0: command}, 60)


def test_weights_that_do_not_belong_to_the_config_any_more(folder: Path) -> None:
    """A longer model in the same folder is loaded as what it is, though the session knew the shorter one."""
    with session_on_threads(1, folder) as session:
        tiny_checkpoint(folder, layers=3)
        with pytest.raises(ModelError, match="has changed since it was loaded"):
            session.prefill(IDS)
        session.load(str(folder), threads=1)
        run = session.prefill(IDS, chunk_size=4)
        run.wait(60)
        assert run.plan.shape.layers == 3


def test_an_edit_of_one_weight_of_a_small_file_is_seen(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    before = check(folder)
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert check(folder).fingerprint != before.fingerprint

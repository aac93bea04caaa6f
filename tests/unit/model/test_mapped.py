"""Weights that are views of their files: what is written to a file after it was loaded is never computed with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dinfer.errors import ModelError
from dinfer.model import mapped
from dinfer.model.decoder import Decoder

WEIGHTS = "model.safetensors"
OVERWRITTEN = "were overwritten after they were loaded"


def overwritten(folder: Path, other: Path) -> None:
    shutil.copyfile(other / WEIGHTS, folder / WEIGHTS)


def shortened(folder: Path, _: Path) -> None:
    os.truncate(folder / WEIGHTS, 2000)


def replaced(folder: Path, other: Path) -> None:
    os.replace(other / WEIGHTS, folder / WEIGHTS)


def removed(folder: Path, _: Path) -> None:
    shutil.rmtree(folder)


def touched(folder: Path, _: Path) -> None:
    os.utime(folder / WEIGHTS, ns=(1, 1))


@pytest.mark.parametrize("change", [overwritten, shortened])
def test_no_step_computes_with_a_file_that_was_written_to(
    folder: Path, other: Path, change: Callable[[Path, Path], None]
) -> None:
    decoder = Decoder.load(folder)
    hidden = decoder.embed([1, 2])
    output = decoder.layer(0, hidden, decoder.new_cache(2), 0)
    change(folder, other)
    steps: list[Callable[[], object]] = [
        lambda: decoder.embed([1]),
        lambda: decoder.layer(0, hidden, decoder.new_cache(2), 0),
        lambda: decoder.norm(output),
        lambda: decoder.logits(output[:, -1:]),
    ]
    for step in steps:
        with pytest.raises(ModelError, match=OVERWRITTEN):
            step()
    assert not decoder.is_intact()


def test_layers_look_at_the_files_once_in_a_while(
    folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each of them: that would take more time than all else beside a small layer."""
    now, looks = 100.0, list[int]()
    monkeypatch.setattr(mapped, "monotonic", lambda: now)
    fstat = os.fstat

    def noted(file: int) -> os.stat_result:
        looks.append(file)
        return fstat(file)

    monkeypatch.setattr(os, "fstat", noted)
    decoder = Decoder.load(folder)
    hidden, cache = decoder.embed([1, 2]), decoder.new_cache(2)
    looks.clear()
    for _ in range(8):
        decoder.layer(0, hidden, cache, 0)
    assert not looks
    overwritten(folder, other)
    now += 2 * mapped.RECENT_S
    for _ in range(2):  # and once it is known, whenever that was
        with pytest.raises(ModelError, match=OVERWRITTEN):
            decoder.layer(0, hidden, cache, 0)


def test_the_last_steps_of_a_token_look_whatever_was_seen_before(folder: Path, other: Path) -> None:
    """So no token rests on a file that was written to while its layers ran."""
    decoder = Decoder.load(folder)
    output = decoder.norm(decoder.forward([1, 2], decoder.new_cache(2), 0))
    overwritten(folder, other)
    with pytest.raises(ModelError, match=OVERWRITTEN):
        decoder.logits(output[:, -1:])


@pytest.mark.parametrize("change", [replaced, removed, touched])
def test_a_file_that_keeps_its_bytes_keeps_the_model(
    folder: Path, other: Path, change: Callable[[Path, Path], None]
) -> None:
    decoder = Decoder.load(folder)
    before = decoder.norm(decoder.forward([1, 2], decoder.new_cache(2), 0))
    change(folder, other)
    assert decoder.is_intact()
    assert decoder.norm(decoder.forward([1, 2], decoder.new_cache(2), 0)).equal(before)


def test_weights_in_memory_do_not_depend_on_files(folder: Path, other: Path) -> None:
    decoder = Decoder.load(folder, mapped=False)
    overwritten(folder, other)
    assert decoder.is_intact()
    decoder.embed([1])


def test_a_model_that_is_gone_keeps_no_file_open(folder: Path) -> None:
    me = psutil.Process()
    decoder = Decoder.load(folder)
    assert str(folder / WEIGHTS) in [file.path for file in me.open_files()]
    del decoder
    assert str(folder / WEIGHTS) not in [file.path for file in me.open_files()]

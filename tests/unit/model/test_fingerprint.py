"""Fingerprints: equal for copies, different for other checkpoints, and the changes that they miss."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinfer.model.checkpoint import SPAN, SPANS, check, sampled_spans
from tests.support.tiny import tiny_checkpoint


def of(folder: Path) -> str:
    """Return the fingerprint of a folder."""
    return check(folder).fingerprint


def flip(file: Path, at: int) -> None:
    """Flip one bit of the byte at `at`."""
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


@pytest.fixture
def large(folder: Path) -> Path:
    """A checkpoint with 4 MB of weights, more than is read."""
    save_file({"weight": torch.arange(1_000_000).float()}, folder / "model.safetensors")
    return folder


def test_copies_have_one_fingerprint(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied elsewhere")
    (copied / "README.md").write_text("more")
    assert of(copied) == of(folder)
    assert len(of(folder)) == 64
    assert of(tiny_checkpoint(tmp_path / "other", "qwen3", layers=1, seed=5)) != of(folder)


def test_a_flipped_bit_in_a_sample_is_noticed(large: Path) -> None:
    file, before = large / "model.safetensors", of(large)
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    spans = sampled_spans(start, file.stat().st_size)
    assert len(spans) == SPANS
    for begin, end in (spans[0], spans[7], spans[-1]):
        for at in (begin, end - 1):
            flip(file, at)
            assert of(large) != before
            flip(file, at)
    assert of(large) == before
    flip(file, spans[3][1] + 5)
    assert of(large) == before, "between the samples nothing is seen, as the module says"


def test_a_small_file_is_read_whole(folder: Path) -> None:
    file, before = folder / "model.safetensors", of(folder)
    flip(file, file.stat().st_size // 2)
    assert of(folder) != before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_another_config_is_noticed(folder: Path, name: str) -> None:
    before, file = of(folder), folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 5.0}))
    assert of(folder) != before


def test_another_split_and_another_name_of_a_weight_are_noticed(folder: Path, tmp_path: Path) -> None:
    split = tiny_checkpoint(tmp_path / "split", "qwen3", layers=1, max_shard_size="60KB")
    assert len(list(split.glob("model-*.safetensors"))) > 1
    assert of(split) != of(folder)
    before, file = of(folder), folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"k_proj", b"K_proj", 1))
    assert of(folder) != before


def test_samples_reach_from_first_to_last_byte() -> None:
    assert sampled_spans(100, 100 + SPANS * SPAN) == [(100, 100 + SPANS * SPAN)]
    spans = sampled_spans(100, 10_000_000_000)
    assert (spans[0][0], spans[-1][1], len(spans)) == (100, 10_000_000_000, 16)
    assert {end - begin for begin, end in spans} == {SPAN}


def test_ten_gigabytes_have_one(folder: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[2500000000],"data_offsets":[0,10000000000]}}'
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 10_000_000_000)  # sparse: takes no space
    assert of(folder) == of(folder)

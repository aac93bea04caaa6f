"""Checkpoints that others have damaged or made: checked, or refused with one error, within seconds and 500 MB."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dinfer.config import Config, ConfigError
from dinfer.errors import ModelError
from dinfer.job import prepare
from dinfer.model.checkpoint import check, ignored_generation
from dinfer.model.text import encode, load_tokenizer
from tests.support.hostile import LIMITED, mutated_bytes, mutated_json, read_limited, read_or_refused
from tests.support.tiny import tiny_checkpoint

several = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file, with a tokenizer."""
    return tiny_checkpoint(tmp_path_factory.mktemp("whole"), layers=2, tokenizer=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files, with an index."""
    return tiny_checkpoint(tmp_path_factory.mktemp("sharded"), layers=2, max_shard_size="50KB")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(whole, tmp_path / "copy")


def changed(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **keys}), encoding="utf-8")


@several
@given(st.data())
def test_a_damaged_config_is_refused_or_read(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy", dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["config.json", "config.json", "generation_config.json"]))
    right = (whole / name).read_bytes()
    as_values = mutated_json(json.loads(right)).map(lambda value: json.dumps(value).encode())
    (copy / name).write_bytes(data.draw(as_values | mutated_bytes(right)))
    read_or_refused(lambda: check(copy))
    read_or_refused(lambda: ignored_generation(copy))


@several
@given(st.data())
def test_damaged_weights_are_refused_or_read(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy", dirs_exist_ok=True)
    right = (whole / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", right[:8])[0]
    headers = mutated_json(json.loads(right[8:end])).map(json.dumps).map(str.encode)
    made = headers.map(lambda text: struct.pack("<Q", len(text)) + text + right[end:])
    (copy / "model.safetensors").write_bytes(data.draw(made | mutated_bytes(right)))
    read_or_refused(lambda: check(copy))


@several
@given(st.data())
def test_a_damaged_index_is_refused_or_read(sharded: Path, tmp_path: Path, data: st.DataObject) -> None:
    copy = shutil.copytree(sharded, tmp_path / "copy", dirs_exist_ok=True)
    right = (sharded / "model.safetensors.index.json").read_bytes()
    as_values = mutated_json(json.loads(right)).map(lambda value: json.dumps(value).encode())
    (copy / "model.safetensors.index.json").write_bytes(data.draw(as_values | mutated_bytes(right)))
    read_or_refused(lambda: check(copy))


@several
@given(st.data())
def test_a_damaged_tokenizer_is_refused_or_encodes(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy", dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    right = (whole / name).read_bytes()
    as_values = mutated_json(json.loads(right)).map(lambda value: json.dumps(value).encode())
    (copy / name).write_bytes(data.draw(as_values | mutated_bytes(right)))
    read_or_refused(lambda: encode(load_tokenizer(copy), "Lima 是秘鲁的首都", chat=False))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 1000, "layer_types": None}, "but its weight files hold"),
        ({"num_hidden_layers": 0, "layer_types": None}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5"),
        ({"head_dim": [16]}, "head_dim"),
    ],
)
def test_sizes_that_no_model_has_are_named(folder: Path, keys: dict[str, Any], words: str) -> None:
    changed(folder, **keys)
    with pytest.raises(ModelError) as caught:
        check(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret.safetensors", 7, None, "a\0b", ["x"], "", "a" * 300]
)
def test_an_index_names_files_beside_it(sharded: Path, tmp_path: Path, name: object) -> None:
    copy = shutil.copytree(sharded, tmp_path / "copy")
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": name}}), encoding="utf-8"
    )
    with pytest.raises(ModelError, match="no file beside it"):
        check(copy)


@pytest.mark.parametrize("path", ["a" * 5000, "~no such user/model"])
def test_a_path_that_there_cannot_be(path: str) -> None:
    with pytest.raises(ModelError, match="cannot be a checkpoint's folder"):
        check(path)


def test_a_prompt_far_longer_than_the_model_is_not_encoded(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("it was encoded")

    monkeypatch.setattr("dinfer.job.encode", fail)
    config = Config(model_path=str(whole), world_size=1, prompt="a" * (4096 * 1024 + 1))
    with pytest.raises(
        ConfigError, match=r"4,194,305 characters; .* has 4,096 positions: shorten the prompt"
    ):
        prepare(config)


@LIMITED
@pytest.mark.timeout(300)
def test_a_hostile_checkpoint_costs_little(whole: Path, tmp_path: Path) -> None:
    copies = {}
    for name in ("layers", "experts", "nested", "large", "header", "dims", "entries", "zero"):
        copies[name] = shutil.copytree(whole, tmp_path / name)
    changed(copies["layers"], num_hidden_layers=10**9, layer_types=None)
    changed(copies["experts"], num_experts=10**9)
    (copies["nested"] / "config.json").write_bytes(b'{"a":' * 2_000_000)
    (copies["large"] / "config.json").write_bytes(b'{"a": [' + b"[]," * 20_000_000 + b"0]}")
    with (copies["header"] / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(100_000_000)
    dims = json.dumps({"a": {"dtype": "F32", "shape": [2**62] * 200_000, "data_offsets": [0, 0]}}).encode()
    (copies["dims"] / "model.safetensors").write_bytes(struct.pack("<Q", len(dims)) + dims)
    entries = {f"t{n}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**15]} for n in range(200_000)}
    many = json.dumps(entries).encode()
    (copies["entries"] / "model.safetensors").write_bytes(struct.pack("<Q", len(many)) + many)
    (copies["zero"] / "config.json").unlink()
    (copies["zero"] / "config.json").symlink_to("/dev/zero")
    found = read_limited(
        "import transformers\nfrom dinfer.model.checkpoint import check\ncheck('demo')",
        "check(path)",
        list(copies.values()),
    )
    assert found.keys() == copies.keys()
    said = {name for name, text in found.items() if text.startswith("ModelError: ")}
    assert said >= copies.keys() - {"experts"}, found

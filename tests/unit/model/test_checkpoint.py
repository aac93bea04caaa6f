"""Checks before loading: the sizes of a good checkpoint, and each error of a bad one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dinfer.errors import ModelError
from dinfer.model.checkpoint import Spec, check, resolve
from tests.support.tiny import CONFIGS, tiny_checkpoint


def edit(folder: Path, **changes: Any) -> None:
    """Set entries of config.json; None takes an entry out."""
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def shard(folder: Path) -> list[Path]:
    """Write the checkpoint again in several files and return them."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 1
    return files


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_spec_of_a_complete_checkpoint(tmp_path: Path, family: str) -> None:
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    sizes = experts if family == "qwen3_moe" else {}
    path = tiny_checkpoint(tmp_path, family, layers=2, dtype="bfloat16", tokenizer=True, **sizes)
    spec = check(path)
    assert spec == Spec(
        path=path.resolve(),
        model_type=family,
        layers=2,
        hidden_size=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab_size=259,
        max_positions=4096,
        dtype="bfloat16",
        tokenizer=True,
        weight_bytes=spec.weight_bytes,
        stored_dtype="bfloat16",
        parameters=spec.weight_bytes // 2,
        intermediate_size=128,
    )
    model = AutoModelForCausalLM.from_pretrained(path)
    assert spec.weight_bytes == sum(weight.nbytes for weight in model.parameters())
    assert check(str(path)) == spec


def test_missing_entries_are_what_transformers_takes_them_for(tmp_path: Path) -> None:
    for family in sorted(CONFIGS):
        path = tiny_checkpoint(tmp_path / family, family, layers=1, num_experts=2)
        edit(path, head_dim=None, num_key_value_heads=None)
        config = CONFIGS[family].from_pretrained(path)
        assert check(path).head_dim == (getattr(config, "head_dim", None) or 64 // 4)
        assert check(path).kv_heads == config.num_key_value_heads


def test_positions_end_where_longrope_changes_the_angles(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "phi3", layers=1)
    assert check(path).max_positions == 4096
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    edit(path, rope_parameters=None, rope_scaling={"type": "longrope", **factors})
    edit(path, original_max_position_embeddings=512)
    assert check(path).max_positions == 512


def test_mixed_dtypes_are_told_from_one(folder: Path) -> None:
    assert check(folder).stored_dtype == "float32"
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"].half()
    save_file(weights, file, metadata={"format": "pt"})
    assert check(folder).stored_dtype == "mixed"


def test_dtype_by_its_old_name_and_from_the_weights(folder: Path) -> None:
    edit(folder, dtype=None, torch_dtype="float16")
    assert check(folder).dtype == "float16"
    edit(folder, torch_dtype=None)
    assert check(folder).dtype == "float32"


def test_shards_are_all_counted(folder: Path) -> None:
    whole = check(folder)
    shard(folder)
    assert check(folder) == whole


def test_a_truncated_shard_is_named_with_what_is_missing(folder: Path) -> None:
    last = shard(folder)[-1]
    size = last.stat().st_size
    with last.open("r+b") as stream:
        stream.truncate(size - 1234)
    with pytest.raises(ModelError, match=rf"{last.name} .* truncated: it has .* 1,234 bytes are missing"):
        check(folder)


@pytest.mark.parametrize("kept", [0, 5, 100])
def test_a_file_cut_in_its_header_is_named(folder: Path, kept: int) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(kept)
    with pytest.raises(ModelError, match=rf"model.safetensors .* truncated: it has {kept} of at least"):
        check(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    files = shard(folder)
    files[1].unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of {len(files)} weight files: {files[1].name}"):
        check(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        (b"\xff" * 64, "is not a safetensors file: its first 8 bytes are not a header length"),
        ((3).to_bytes(8, "little") + b"{,}", "is not a safetensors file: its header cannot be read"),
        ((9).to_bytes(8, "little") + b'{"a": {}}', "is not a safetensors file: its header cannot be read"),
    ],
)
def test_files_that_are_no_weights_are_named(folder: Path, content: bytes, message: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        check(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        ModelError, match=r"has no weights: neither model.safetensors nor model.safetensors.index"
    ):
        check(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("model.safetensors.index.json", "{", "cannot be read as JSON"),
        ("model.safetensors.index.json", "{}", "names no weights"),
        ("config.json", "not json", "cannot be read as JSON"),
        ("config.json", "[]", "holds list, not a JSON object"),
    ],
)
def test_a_broken_index_or_config(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        check(folder)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "has hidden_size=None; it must be a whole number"),
        ({"hidden_size": 0}, "has hidden_size=0; it must be a whole number"),
        ({"hidden_size": "64"}, "has hidden_size='64'; it must be a whole number"),
        ({"model_type": "gemma4"}, "per_layer_input.*Supported: gemma2, "),
        ({"model_type": "gpt2"}, "has not been tested.*Supported: gemma2, "),
        ({"model_type": None}, "'None' is not supported.*Supported: gemma2, "),
        ({"quantization_config": {"quant_method": "fp8"}}, "holds quantized weights"),
        ({"rope_parameters": DYNAMIC}, "has rope type 'dynamic', which is not supported"),
        (
            {"rope_parameters": None, "rope_scaling": DYNAMIC},
            "has rope type 'dynamic', which is not supported",
        ),
    ],
)
def test_what_does_not_fit_is_told(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ModelError, match=message):
        check(folder)


def test_a_folder_without_config_lists_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config.json, so it is not a checkpoint. It holds: nothing"):
        check(tmp_path)
    for number in range(10):
        (tmp_path / f"file{number}").touch()
    with pytest.raises(ModelError, match=r"It holds: file0, file1, .*, file7 and 2 more"):
        check(tmp_path)


def test_no_such_folder(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"folder .*nowhere does not exist; give the folder of a checkpoint"):
        check(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is a file; give the folder"):
        check(folder / "config.json")


def test_hub_names_are_looked_up_in_the_local_cache_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    with pytest.raises(ModelError, match=r"local Hugging Face cache has no model of that name.*hf download"):
        resolve("dinfer-tests/there-is-no-such-model")

    def found(name: str, local_files_only: bool) -> str:
        assert (name, local_files_only) == ("some/model", True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    assert resolve("some/model") == folder


def test_light_modules_do_not_import_torch(folder: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['numpy'] = None\n"
        "import dinfer.model, dinfer.model.families, dinfer.model.sampling, dinfer.model.memory\n"
        "from dinfer.model.checkpoint import check, resolve\n"
        "dinfer.model.sampling.Sampling(temperature=0.7)\n"
        f"assert (spec := check({str(folder)!r})).layers == 1\n"
        "from dinfer.model.checkpoint import fingerprint\n"
        "assert len(fingerprint(spec)) == 64\n"
        "dinfer.model.memory.check_memory(spec, 'auto', 100, 3)\n"
        "try: resolve('dinfer-tests/there-is-no-such-model')\n"
        "except dinfer.errors.ModelError: print('fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        timeout=250,
    )
    assert done.stdout == "fine\n", done.stderr

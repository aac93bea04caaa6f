"""Checks before loading: the sizes of a good checkpoint, and each error of a bad one."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dinfer.errors import ModelError
from dinfer.model.checkpoint import Spec, check, ignored_generation, resolve
from dinfer.model.decoder import Decoder
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
        model_positions=4096,
        length_dependent=False,
        dtype="bfloat16",
        tokenizer=True,
        weight_bytes=spec.weight_bytes,
        stored_dtype="bfloat16",
        parameters=spec.weight_bytes // 2,
        intermediate_size=128,
        fingerprint=spec.fingerprint,
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


FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 512}, 512),
        ({"rope_scaling": {"type": "yarn", **FACTORS}, "original_max_position_embeddings": 512}, 512),
        ({"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": None}, 4096),
        (
            {
                "original_max_position_embeddings": None,
                "rope_parameters": {
                    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256},
                    **FACTORS,
                },
            },
            4096,  # what the class has goes before it
        ),
    ],
    ids=[
        "by its name",
        "by the name it had for Phi 3",
        "by the default of its class",
        "in the rope's parameters",
    ],
)
def test_positions_end_where_longrope_changes_the_angles(
    tmp_path: Path, changes: dict[str, Any], positions: int
) -> None:
    """However the config spells it: what counts is what transformers makes of it."""
    path = tiny_checkpoint(tmp_path, "phi3", layers=1, max_position_embeddings=8192)
    assert check(path).max_positions == 8192
    assert not check(path).length_dependent
    edit(path, rope_parameters=None)
    edit(path, **changes)
    assert check(path).length_dependent
    assert (check(path).max_positions, check(path).model_positions) == (positions, 8192)


def test_former_keys_and_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama", layers=1)
    edit(path, max_position_embeddings=None, num_key_value_heads=None, intermediate_size=None)
    assert check(path).max_positions == 2048
    assert check(path).kv_heads == 4
    assert check(path).intermediate_size == 11008


def test_weights_that_are_not_quantized_may_say_so(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert check(folder).layers == 1


def test_whole_weights_are_taken_though_the_index_of_others_was_left(folder: Path) -> None:
    before = check(folder)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check(folder) == before


def without(folder: Path, part: str) -> None:
    """Take the weights whose names hold `part` out of the file."""
    file = folder / "model.safetensors"
    kept = {name: weight for name, weight in load_file(file).items() if part not in name}
    save_file(kept, file, metadata={"format": "pt"})


def test_weights_of_another_size_than_the_config_says(folder: Path) -> None:
    edit(folder, vocab_size=200)
    with pytest.raises(
        ModelError, match=r"do not belong together: .* is 200 × 64, the files hold 128 × 64"
    ) as caught:
        Decoder.load(folder)
    assert "vocab_size is 200 there, where 128 would fit" in str(caught.value)


def test_what_lacks_weights_is_called_by_its_name(folder: Path) -> None:
    without(folder, "embed_tokens")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: None, "download the checkpoint again"),
        (
            lambda: edit(folder, architectures=["LlamaDraftModel"]),
            "calls it LlamaDraftModel, which is not a whole",
        ),
        (lambda: (folder / "adapter_config.json").touch(), "it holds an adapter; merge it"),
    ]
    for prepare, words in cases:
        prepare()
        with pytest.raises(ModelError, match=rf"lacks 1 weights .* 'model.embed_tokens.weight'.*{words}"):
            Decoder.load(folder)


def test_weights_under_other_names(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({f"tower.{name}": w for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"of other names, the first 'tower\..*: it is part of another model"
    ):
        Decoder.load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4, "factor": 4.0}}, "rope type 'ntk'"),
        ({"hidden_act": "swoosh"}, "activation 'swoosh'"),
    ],
)
def test_what_transformers_does_not_know(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit(folder, **changes)
    with pytest.raises(
        ModelError, match=f"names {words}, which the installed transformers does not know. It knows "
    ):
        check(folder)


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
    assert replace(check(folder), fingerprint=whole.fingerprint) == whole


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


@pytest.mark.parametrize(("text", "message"), [("{", "it is not JSON"), ("{}", "names no weights")])
def test_a_broken_index(folder: Path, text: str, message: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        check(folder)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, r"transformers does not accept .*config.json: .*hidden_size"),
        ({"model_type": "gemma4"}, "per_layer_input.*Supported: gemma2, "),
        ({"model_type": "gpt2"}, "has not been tested.*Supported: gemma2, "),
        ({"model_type": None}, "config.json does not say its model_type.*Supported: gemma2, "),
        ({"model_type": ""}, "config.json does not say its model_type.*Supported: gemma2, "),
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


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, ""),
        ({"eos_token_id": [1, 2], "do_sample": False, "use_cache": True, "temperature": 0.6}, ""),
        ({"repetition_penalty": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0, "min_length": None}, ""),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95},
            "sampling, temperature 0.6, top_p 0.95 (dinfer is greedy unless its own parameters say otherwise)",
        ),
        (
            {
                "do_sample": True,
                "repetition_penalty": 1.1,
                "no_repeat_ngram_size": 3,
                "renormalize_logits": True,
            },
            "sampling (dinfer is greedy unless its own parameters say otherwise); no_repeat_ngram_size 3, "
            "renormalize_logits True, repetition_penalty 1.1 (dinfer has no such parameter)",
        ),
    ],
)
def test_what_generation_config_asks_for_and_does_not_get(
    folder: Path, asked: dict[str, Any], said: str
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(asked))
    assert ignored_generation(folder) == (f"not taken from generation_config.json: {said}" if said else "")


def test_many_missing_shards_are_counted_and_five_named(folder: Path) -> None:
    names = [f"model-{n:05}-of-00206.safetensors" for n in range(1, 207)]
    (folder / "model.safetensors").unlink()
    weights = {f"w{name}": name for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(ModelError, match=r"lacks 206 of 206 weight files: .*-00005-of-\S+ and 201 more$"):
        check(folder)


def test_light_modules_do_not_import_torch(folder: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['numpy'] = None\n"
        "import dinfer.model, dinfer.model.families, dinfer.model.sampling, dinfer.model.memory\n"
        "from dinfer.model.checkpoint import resolve\n"
        "dinfer.model.sampling.Sampling(temperature=0.7)\n"
        f"assert resolve({str(folder)!r}).is_dir()\n"
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

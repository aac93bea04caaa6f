"""Checks a checkpoint folder before anything is loaded, and computes its fingerprint.

It reads config.json and the headers of the safetensors files, with the standard library alone: no torch, no weights in
memory, milliseconds for any size. It does not check the values of the weights.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinfer.errors import ModelError
from dinfer.model.families import family_in

_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER = 100_000_000  # the limit of the safetensors format
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

SPAN = 64 * 1024  # bytes of one sample
SPANS = 16  # samples of one file


@dataclass(frozen=True)
class Spec:
    """The sizes and dtypes of a checkpoint.

    `dtype`: the config's; `stored_dtype`: that of the files ("mixed" if several); `tokenizer`: whether there is one;
    `weight_bytes`, `parameters`: of all files; `intermediate_size`: the width of the MLP that one token passes.
    """

    path: Path
    model_type: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    dtype: str
    tokenizer: bool
    weight_bytes: int
    stored_dtype: str
    parameters: int
    intermediate_size: int


def resolve(path: str | Path) -> Path:
    """The folder of a checkpoint: "demo", a folder, or a Hugging Face id in the local cache.

    Never downloads. Raises `ModelError` if there is no such folder.
    """
    if str(path) == "demo":
        from dinfer.model.demo import CHECKPOINT

        return Path(CHECKPOINT)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise ModelError(f"{folder} is a file; give the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ModelError(
            f"folder {folder} does not exist; give the folder of a checkpoint, or 'demo' for the built-in model"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"folder {str(path)!r} does not exist, and the local Hugging Face cache has no model of that name. "
            f"dinfer downloads nothing: fetch it first (hf download {path}) or give a checkpoint's folder"
        ) from error


def check(path: str | Path) -> Spec:
    """The `Spec` of a checkpoint. Raises `ModelError` if it is incomplete or its architecture unsupported."""
    folder = resolve(path)
    if not (folder / "config.json").is_file():
        there = sorted(entry.name for entry in folder.iterdir())
        listed = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
        raise ModelError(
            f"{folder} has no config.json, so it is not a checkpoint. It holds: {listed or 'nothing'}"
        )
    config = _read_json(folder / "config.json")
    family = family_in(config)
    # Old and new key; Gemma3 has one rope for each layer type.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    ropes = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    rope_types = {one.get(key) for one in ropes for key in ("rope_type", "type")}
    _check_features(config, rope_types, folder)
    headers = [_header(file) for file in weight_files(folder)]
    weights = [entry for entries, _ in headers for entry in entries]
    stored = {
        _DTYPES.get(entry["dtype"], str(entry["dtype"])): None for entry in weights
    }  # in the files' order
    first_dtype = next(iter(stored), "float32")
    heads, hidden = _size(config, "num_attention_heads", folder), _size(config, "hidden_size", folder)
    positions = _size(config, "max_position_embeddings", folder)
    if "longrope" in rope_types:
        # Beyond its original positions transformers rotates new tokens by other angles than those in the cache, and
        # its `generate` runs the prompt again, so results would depend on the chunks.
        key = "original_max_position_embeddings"
        positions = min(positions, int(rope.get(key) or config.get(key) or positions))
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
    experts = int(config.get("moe_intermediate_size") or 0) * int(config.get("num_experts_per_tok") or 0)
    return Spec(
        path=folder,
        model_type=str(config["model_type"]),
        layers=_size(config, "num_hidden_layers", folder),
        hidden_size=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads", family.default_kv_heads) or heads),
        head_dim=int(config.get("head_dim") or family.default_head_dim or hidden // heads),
        vocab_size=_size(config, "vocab_size", folder),
        max_positions=positions,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or first_dtype),
        tokenizer=any((folder / name).is_file() for name in tokenizers),
        weight_bytes=sum(data for _, data in headers),
        stored_dtype=first_dtype if len(stored) < 2 else "mixed",
        parameters=sum(math.prod(entry["shape"]) for entry in weights),
        intermediate_size=max(experts, int(config.get("intermediate_size") or 0)),
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}); download the checkpoint again") from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{file} holds {type(value).__name__}, not a JSON object; download the checkpoint again"
        )
    return value


def _check_features(config: Mapping[str, Any], rope_types: set[Any], folder: Path) -> None:
    if "quantization_config" in config:
        raise ModelError(
            f"{folder} holds quantized weights, which are not supported; use the float16 or bfloat16 checkpoint"
        )
    kinds = {str(kind) for kind in config.get("layer_types") or ()} - {"full_attention", "sliding_attention"}
    if kinds:
        raise ModelError(
            f"{folder} has layers of type {', '.join(sorted(kinds))}, which are not supported: "
            "they keep no plain K and V"
        )
    if config.get("use_bidirectional_attention"):
        raise ModelError(f"{folder} attends to later tokens too, so it cannot decode")
    if "dynamic" in rope_types:
        raise ModelError(
            f"{folder} has rope type 'dynamic', which is not supported: its angles depend on the longest "
            "text so far, so going back would change results"
        )


def _size(config: Mapping[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{folder}/config.json has {key}={value!r}; it must be a whole number, at least 1")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises `ModelError` if one is missing."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return [single]
        raise ModelError(
            f"{folder} has no weights: neither {single.name} nor {index.name} (other formats are not supported)"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} names no weights; download the checkpoint again")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"{folder} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing)}")
    return files


def _header(file: Path) -> tuple[list[Mapping[str, Any]], int]:
    """The entries of a safetensors file, each with dtype, shape and data_offsets, and the bytes of its data. Raises
    `ModelError` if the file is shorter than its header says.

    By the README of safetensors: 8 bytes of header length (little endian), the header as JSON, then the data.
    """
    broken = f"{file} is not a safetensors file: its"
    with file.open("rb") as stream:
        start = stream.read(8)
        if (start + stream.read(len(_LFS_POINTER) - 8)) == _LFS_POINTER:
            raise ModelError(
                f"{file} is a Git LFS pointer, not the weights; run 'git lfs pull' in {file.parent}"
            )
        length = int.from_bytes(start, "little")
        if length > _MAX_HEADER:
            raise ModelError(f"{broken} first 8 bytes are not a header length; download it again")
        _check_length(file, 8 if len(start) < 8 else 8 + length)
        stream.seek(8)
        text = stream.read(length)
    try:
        entries = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
        data = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        for entry in entries:
            _ = math.prod(entry["shape"]), entry["dtype"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{broken} header cannot be read; download it again") from error
    _check_length(file, 8 + length + data)
    return entries, data


def _check_length(file: Path, expected: int) -> None:
    actual = file.stat().st_size
    if actual < expected:
        raise ModelError(
            f"{file.name} in {file.parent} is truncated: it has {actual:,} of at least {expected:,} bytes, "
            f"{expected - actual:,} bytes are missing; download this file again"
        )


def fingerprint(spec: Spec) -> str:
    """64 hex digits by which ranks find out whether they loaded the same checkpoint. Raises `ModelError`.

    It reads samples and takes milliseconds: the configs; the name, size and header of each safetensors file (names,
    dtypes, shapes and offsets of all weights); and 16 evenly spaced spans of 64 KiB of each file's data. Files of up to
    1 MiB are read whole.

    It does not see a change between the spans (a flipped bit, an edited row; a training step changes all weights and is
    seen), the tokenizer, or weights edited after loading. It does not protect against deliberate forgery. The same
    weights split into other files have another fingerprint.
    """
    digest = hashlib.sha256(b"dinfer checkpoint 1")

    def add(part: bytes) -> None:
        """Add a part with its length, so that none can pass for the end of another."""
        digest.update(len(part).to_bytes(8, "little") + part)

    for name in ("config.json", "generation_config.json"):
        file = spec.path / name
        add(name.encode())
        add(file.read_bytes() if file.is_file() else b"")
    for file in weight_files(spec.path):
        size = file.stat().st_size
        add(file.name.encode())
        add(str(size).encode())
        with file.open("rb", buffering=0) as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            for begin, end in [(0, start), *sampled_spans(start, size)]:
                stream.seek(begin)
                add(stream.read(end - begin))
    return digest.hexdigest()


def sampled_spans(start: int, size: int) -> list[tuple[int, int]]:
    """What is read, as (from, to), of a file of `size` bytes whose data begins at `start`."""
    data = size - start
    if data <= SPANS * SPAN:
        return [(start, size)]
    begins = [start + (data - SPAN) * index // (SPANS - 1) for index in range(SPANS)]
    return [(begin, begin + SPAN) for begin in begins]

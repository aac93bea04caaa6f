"""Checks a checkpoint folder before anything is loaded, and computes its fingerprint.

It reads config.json and the headers of the safetensors files, with the standard library alone: no torch, no weights in
memory, milliseconds for any size. It does not check the values of the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dinfer.errors import ModelError
from dinfer.model.families import family_in

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_LFS_POINTER = b"version https://git-lfs"

_MAX_HEADER = 100_000_000  # the limit of the safetensors format

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_CONFIGS = ("config.json", "generation_config.json")

SPAN = 64 * 1024
"""bytes of one sample"""

SPANS = 16
"""samples of one file"""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Spec:
    """The sizes and dtypes of a checkpoint.

    `max_positions`: in tokens; `dtype`: the config's; `stored_dtype`: that of the files ("mixed" if several);
    `tokenizer`: whether there is one; `weight_bytes` and `parameters`: of all files together; `intermediate_size`: the
    width of the MLP of one token.
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
    """Return the folder of a checkpoint: "demo", a folder, or a Hugging Face id in the local cache.

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
    if _HUB_ID.fullmatch(str(path)):
        return _from_hub_cache(str(path))
    raise ModelError(
        f"folder {folder} does not exist; give the folder of a checkpoint, or 'demo' for the built-in model"
    )


def check(path: str | Path) -> Spec:
    """Return the `Spec` of a checkpoint. Raises `ModelError` if it is incomplete or its architecture unsupported."""
    folder = resolve(path)
    config = _read_json(_config_file(folder))
    family = family_in(config)
    _check_features(config, folder)
    headers = [_header(file) for file in weight_files(folder)]
    weights = [entry for header in headers for entry in _entries(header)]
    heads, hidden = _size(config, "num_attention_heads", folder), _size(config, "hidden_size", folder)
    return Spec(
        path=folder,
        model_type=str(config["model_type"]),
        layers=_size(config, "num_hidden_layers", folder),
        hidden_size=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads", family.default_kv_heads) or heads),
        head_dim=int(config.get("head_dim") or family.default_head_dim or hidden // heads),
        vocab_size=_size(config, "vocab_size", folder),
        max_positions=_max_positions(config, folder),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or _first_dtype(weights)),
        tokenizer=any((folder / name).is_file() for name in _TOKENIZER_FILES),
        weight_bytes=sum(_data_bytes(header) for header in headers),
        stored_dtype=_first_dtype(weights) if len({entry["dtype"] for entry in weights}) < 2 else "mixed",
        parameters=sum(math.prod(entry["shape"]) for entry in weights),
        intermediate_size=_intermediate(config),
    )


def _from_hub_cache(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"folder {name!r} does not exist, and the local Hugging Face cache has no model of that name. "
            f"dinfer downloads nothing: fetch it first (hf download {name}) or give a checkpoint's folder"
        ) from error


def _config_file(folder: Path) -> Path:
    file = folder / "config.json"
    if file.is_file():
        return file
    there = sorted(entry.name for entry in folder.iterdir())
    listed = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    raise ModelError(
        f"{folder} has no config.json, so it is not a checkpoint. It holds: {listed or 'nothing'}"
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


def _check_features(config: Mapping[str, Any], folder: Path) -> None:
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
    if "dynamic" in _rope_types(config):
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
    """Return the safetensors files of a checkpoint. Raises `ModelError` if one is missing."""
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


def _header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file. Raises `ModelError` if the file is shorter than the header says.

    The file has 8 bytes of header length (little endian), the header as JSON, then the data at the header's offsets.
    Source: the README of safetensors.
    """
    actual = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if (start + stream.read(len(_LFS_POINTER) - 8)) == _LFS_POINTER:
            raise ModelError(
                f"{file} is a Git LFS pointer, not the weights; run 'git lfs pull' in {file.parent}"
            )
        length = int.from_bytes(start, "little")
        _check_length(file, actual, 8 if len(start) < 8 else 8 + length, length)
        stream.seek(8)
        header = _parse_header(file, stream.read(length))
    _check_length(file, actual, 8 + length + _data_bytes(header), length)
    return header


def _check_length(file: Path, actual: int, expected: int, header_length: int) -> None:
    if header_length > _MAX_HEADER:
        raise ModelError(
            f"{file} is not a safetensors file: its first 8 bytes are not a header length; download it again"
        )
    if actual < expected:
        raise ModelError(
            f"{file.name} in {file.parent} is truncated: it has {actual:,} of at least {expected:,} bytes, "
            f"{expected - actual:,} bytes are missing; download this file again"
        )


def _parse_header(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
        _data_bytes(header)
        [(math.prod(entry["shape"]), entry["dtype"]) for entry in _entries(header)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file} is not a safetensors file: its header cannot be read; download it again"
        ) from error
    return dict(header)


def _entries(header: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the header's entries: dtype, shape and data_offsets of each tensor."""
    return [entry for name, entry in header.items() if name != "__metadata__"]


def _data_bytes(header: Mapping[str, Any]) -> int:
    return max((int(entry["data_offsets"][1]) for entry in _entries(header)), default=0)


def _first_dtype(weights: Sequence[Mapping[str, Any]]) -> str:
    """Return the dtype of the first weight, by its torch name."""
    first = weights[0]["dtype"] if weights else "F32"
    return _DTYPES.get(first, str(first))


def _max_positions(config: Mapping[str, Any], folder: Path) -> int:
    """Return the number of positions; with longrope, those before it changes all angles.

    Beyond them transformers rotates new tokens by other angles than those in the cache, and its `generate` runs the
    prompt again, so results would depend on the chunks.
    """
    positions = _size(config, "max_position_embeddings", folder)
    if "longrope" not in _rope_types(config):
        return positions
    rope = _rope(config)
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return min(positions, int(original or positions))


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_types(config: Mapping[str, Any]) -> set[Any]:
    """Return the rope types of a config, under their old and new key; Gemma3 has one for each layer type."""
    rope = _rope(config)
    all_of_them = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    return {one.get(key) for one in all_of_them for key in ("rope_type", "type")}


def _intermediate(config: Mapping[str, Any]) -> int:
    """Return the width of the MLP of one token; with experts, of all experts that it passes."""
    experts = int(config.get("moe_intermediate_size") or 0) * int(config.get("num_experts_per_tok") or 0)
    return max(experts, int(config.get("intermediate_size") or 0))


def fingerprint(spec: Spec) -> str:
    """Return 64 hex digits by which ranks find out whether they loaded the same checkpoint. Raises `ModelError`.

    It reads samples and takes milliseconds: the configs; the name, size and header of each safetensors file (names,
    dtypes, shapes and offsets of all weights); and 16 evenly spaced spans of 64 KiB of each file's data. Files of up to
    1 MiB are read whole.

    It does not see a change between the spans (a flipped bit, an edited row; a training step changes all weights and is
    seen), the tokenizer, or weights edited after loading. It does not protect against deliberate forgery. The same
    weights split into other files have another fingerprint.
    """
    digest = hashlib.sha256(b"dinfer checkpoint 1")
    for name in _CONFIGS:
        file = spec.path / name
        _add(digest, name.encode(), file.read_bytes() if file.is_file() else b"")
    for file in weight_files(spec.path):
        _add(digest, file.name.encode(), *_sampled(file))
    return digest.hexdigest()


def sampled_spans(start: int, size: int) -> list[tuple[int, int]]:
    """Return what is read, as (from, to), of a file of `size` bytes whose data begins at `start`."""
    data = size - start
    if data <= SPANS * SPAN:
        return [(start, size)]
    begins = [start + (data - SPAN) * index // (SPANS - 1) for index in range(SPANS)]
    return [(begin, begin + SPAN) for begin in begins]


def _sampled(file: Path) -> Iterator[bytes]:
    """Yield a file's size, its header, and its samples."""
    size = file.stat().st_size
    yield str(size).encode()
    with file.open("rb", buffering=0) as stream:
        start = 8 + int.from_bytes(_read(stream, 0, 8), "little")
        yield _read(stream, 0, start)
        for begin, end in sampled_spans(start, size):
            yield _read(stream, begin, end)


def _read(stream: BinaryIO, begin: int, end: int) -> bytes:
    stream.seek(begin)
    return stream.read(end - begin)


def _add(digest: hashlib._Hash, *parts: bytes) -> None:
    """Add parts with their lengths, so that none can pass for the end of another."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)

"""Checks a checkpoint folder before anything is loaded, and computes its fingerprint.

It reads config.json, as transformers resolves it, and the headers of the safetensors files: no weights in memory,
milliseconds for any size once transformers is imported. It does not check the values of the weights.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from dinfer.errors import ModelError, excerpt
from dinfer.files import FileError, as_json, read_bytes
from dinfer.model.families import family_in

_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER = 25_000_000  # a quarter of what the safetensors format allows, and 200,000 tensors
_MAX_JSON = 50_000_000  # bytes; the index of a model of a trillion parameters has 10 MB
_MAX_LAYERS = 99_999
_MAX_SIZE = 1 << 40
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CONFIGS = ("config.json", "generation_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")

SPAN = 64 * 1024  # bytes of one sample
SPANS = 16  # samples of one file


@dataclass(frozen=True)
class Spec:
    """The sizes and dtypes of a checkpoint.

    `max_positions`: in tokens, at most `model_positions`, those of the model; `dtype`: the config's; `stored_dtype`:
    that of the files ("mixed" if several); `tokenizer`: whether there is one; `weight_bytes` and `parameters`: of all
    files together; `intermediate_size`: the width of the MLP of one token; `fingerprint`: of what the files held, see
    `fingerprint()`.
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
    model_positions: int
    length_dependent: bool
    dtype: str
    tokenizer: bool
    weight_bytes: int
    stored_dtype: str
    parameters: int
    intermediate_size: int
    fingerprint: str


def resolve(path: str | Path) -> Path:
    """The folder of a checkpoint: "demo", a folder, or a Hugging Face id in the local cache.

    Never downloads. Raises `ModelError` if there is no such folder.
    """
    if not str(path).strip():
        raise ModelError(
            "no folder is given, but an empty name; give the folder of a checkpoint, or 'demo' for the built-in model"
        )
    if str(path) == "demo":
        from dinfer.model.demo import CHECKPOINT

        return Path(CHECKPOINT)
    try:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return folder.resolve()
        is_file = folder.exists()
    # A name too long, with NUL, of an unknown user, not allowed.
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{excerpt(str(path))} cannot be a checkpoint's folder: {in_one_line(error)}; give the folder of one, or "
            "'demo' for the built-in model"
        ) from error
    if is_file:
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
    raw = _read_json(folder / "config.json")
    try:
        _check_counts(raw, folder / "config.json")
        family_in(raw)
        return _spec(folder, raw, resolved_config(folder))
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{folder / 'config.json'} has a value that this model cannot have ({in_one_line(error)}); download the "
            "checkpoint again"
        ) from error


def _spec(folder: Path, raw: Mapping[str, Any], config: Any) -> Spec:
    """Raises also what values of a wrong type make Python raise."""
    _check_features(raw, config, folder)
    headers = [_header(file) for file in weight_files(folder)]
    weights = [entry for entries, _ in headers for entry in entries.values()]
    _check_sizes(config, len(weights), folder / "config.json")
    # A dict and not a set: in the files' order.
    stored = {_DTYPES.get(entry.dtype, entry.dtype): None for entry in weights}
    first_dtype = next(iter(stored), "float32")
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    positions = longest = int(config.max_position_embeddings)
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope":
            # Beyond its original positions transformers rotates new tokens by other angles than those in the cache, and
            # its `generate` runs the prompt again, so results would depend on the chunks.
            key = "original_max_position_embeddings"
            positions = min(positions, int(rope.get(key) or getattr(config, key, None) or positions))
    experts = getattr(config, "moe_intermediate_size", 0) * getattr(config, "num_experts_per_tok", 0)
    return Spec(
        path=folder,
        model_type=str(config.model_type),
        layers=int(config.num_hidden_layers),
        hidden_size=hidden,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        vocab_size=int(config.vocab_size),
        max_positions=positions,
        model_positions=longest,
        length_dependent=any(rope.get("rope_type") in ("longrope", "dynamic") for rope in _ropes(config)),
        dtype=str(config.dtype or first_dtype).removeprefix("torch."),
        tokenizer=has_tokenizer(folder),
        weight_bytes=sum(data for _, data in headers),
        stored_dtype=first_dtype if len(stored) < 2 else "mixed",
        parameters=sum(math.prod(entry.shape) for entry in weights),
        intermediate_size=max(experts, int(config.intermediate_size or 0)),
        fingerprint=fingerprint(folder),
    )


def check_unchanged(spec: Spec) -> None:
    """Raises `ModelError` if the folder holds something else than when `spec` was made of it. Reads samples only: it is
    called for every run."""
    try:
        found = fingerprint(spec.path)
    except ModelError as error:
        raise ModelError(
            f"{spec.path} has changed since it was loaded, and cannot be loaded now: {error}"
        ) from error
    if found != spec.fingerprint:
        raise ModelError(
            f"{spec.path} has changed since it was loaded (its config or weights): session.load({str(spec.path)!r}) "
            "loads it again on all ranks"
        )


_SAMPLING = ("temperature", "top_k", "top_p")
_WITHOUT_EFFECT = {
    "transformers_version",
    "use_cache",
    "max_length",
    "max_new_tokens",
    "cache_implementation",
}


def ignored_generation(folder: Path) -> str:
    """What generation_config.json asks for and dinfer does not do, in a sentence; "" for nothing."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return ""
    given = _read_json(file)
    sampled = bool(given.pop("do_sample", False))
    sampling = {name: given.pop(name) for name in _SAMPLING if name in given}  # no effect without do_sample
    unknown = {
        name: value
        for name, value in sorted(given.items())
        if not name.startswith(("_", "output_", "return_")) and not name.endswith("_token_id")
        # A penalty of 1, a size of 0 or a switch that is off asks for nothing.
        if name not in _WITHOUT_EFFECT and (value is True or value not in (None, False, 0, 1, "", [], {}))
    }
    parts = []
    if sampled:
        named = ", ".join(["sampling", *(f"{name} {value}" for name, value in sampling.items())])
        parts.append(f"{named} (dinfer is greedy unless its own parameters say otherwise)")
    if unknown:
        named = ", ".join(f"{name} {value}" for name, value in unknown.items())
        parts.append(f"{named} (dinfer has no such parameter)")
    return f"not taken from generation_config.json: {'; '.join(parts)}" if parts else ""


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies beside the weights."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def resolved_config(folder: Path) -> Any:
    """The configuration as transformers resolves it: defaults of its class filled in, former names of keys understood.
    Raises `ModelError`."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config class may raise anything for values that it does not expect
        raise ModelError(
            f"transformers does not accept {folder / 'config.json'}: {in_one_line(error)}"
        ) from error


def in_one_line(error: BaseException) -> str:
    """The type of another library's error, and what it says, in one line and cut if long."""
    text = " ".join(str(error).split())
    text = f"{text[:300]}…" if len(text) > 300 else text
    return f"{type(error).__name__}: {text}"


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The parameters of all rotary embeddings: a model has one, or (Gemma3) one for each layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, Mapping))]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = as_json(read_bytes(file, _MAX_JSON))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except FileError as error:
        raise ModelError(f"{file} cannot be read ({error}); download the checkpoint again") from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{file} holds {type(value).__name__}, not a JSON object; download the checkpoint again"
        )
    return value


def _check_counts(raw: Mapping[str, Any], file: Path) -> None:
    """Raises `ModelError` for a number of layers or experts that no model has: transformers makes lists as long."""
    for name, value in raw.items():
        if isinstance(value, Mapping):
            _check_counts(value, file)
        elif isinstance(value, int) and value > _MAX_LAYERS and re.search(r"n(um)?_.*(layer|expert)", name):
            raise ModelError(f"{name} is {excerpt(value)} in {file}; no model has more than {_MAX_LAYERS:,}")


def _check_sizes(config: Any, tensors: int, file: Path) -> None:
    """Raises `ModelError` for sizes that are none, and for more layers than there are tensors."""
    for name in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ):
        value = getattr(config, name, None)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIZE:
            raise ModelError(f"{name} is {excerpt(value)} in {file}; it must be a whole number, at least 1")
    for name in ("num_key_value_heads", "head_dim", "intermediate_size"):
        value = getattr(config, name, None)
        if value is not None and (not isinstance(value, int) or not 0 <= value <= _MAX_SIZE):
            raise ModelError(f"{name} is {excerpt(value)} in {file}; it must be a whole number")
    if config.num_hidden_layers > tensors:
        raise ModelError(
            f"num_hidden_layers is {config.num_hidden_layers} in {file}, but its weight files hold {tensors} tensors: "
            "the config is of another model"
        )


def _check_features(raw: Mapping[str, Any], config: Any, folder: Path) -> None:
    if raw.get("quantization_config"):
        raise ModelError(
            f"{folder} holds quantized weights, which are not supported; use the float16 or bfloat16 checkpoint"
        )
    supported = {"full_attention", "sliding_attention"}
    if kinds := {str(kind) for kind in getattr(config, "layer_types", None) or ()} - supported:
        raise ModelError(
            f"{folder} has layers of type {', '.join(sorted(kinds))}, which are not supported: "
            "they keep no plain K and V"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError(f"{folder} attends to later tokens too, so it cannot decode")
    types = {str(rope["rope_type"]) for rope in _ropes(config) if rope.get("rope_type")}
    if "dynamic" in types:
        raise ModelError(
            f"{folder} has rope type 'dynamic', which is not supported: its angles depend on the longest "
            "text so far, so going back would change results"
        )
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    for what, names, known in (
        ("rope type", types, {"default", *ROPE_INIT_FUNCTIONS}),
        ("activation", {str(activation)} - {"None"}, set(ACT2FN)),
    ):
        if unknown := names - known:
            raise ModelError(
                f"{folder / 'config.json'} names {what} {min(unknown)!r}, which the installed transformers does not "
                f"know. It knows {', '.join(sorted(known))}. A newer transformers may, or the name is wrong"
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises `ModelError` if one is missing."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]  # transformers takes it even where there is an index, which is then a leftover
    if not index.is_file():
        raise ModelError(
            f"{folder} has no weights: neither {single.name} nor {index.name} (other formats are not supported)"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} names no weights; download the checkpoint again")
    for name in weight_map.values():
        if (
            not isinstance(name, str)
            or not 0 < len(name) <= 255
            or Path(name).is_absolute()
            or ".." in Path(name).parts
            or "\0" in name
        ):
            raise ModelError(
                f"{index} names {excerpt(name)}, which is no file beside it; download the checkpoint again"
            )
    files = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        named = ", ".join(missing[:5]) + more
        raise ModelError(f"{folder} lacks {len(missing)} of {len(files)} weight files: {named}")
    return files


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights by name, from the headers of the files. Raises `ModelError`."""
    entries = [item for file in weight_files(folder) for item in _header(file)[0].items()]
    return {name: entry.shape for name, entry in entries}


class _Entry(msgspec.Struct):
    """What the header of a safetensors file says of one tensor. The offsets are bytes from the start of the data."""

    dtype: str
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=_MAX_SIZE)], ...], Meta(max_length=16)]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]


_entry = msgspec.json.Decoder(_Entry)


def _header(file: Path) -> tuple[dict[str, _Entry], int]:
    """The entries of a safetensors file by name, and the bytes of its data.
    Raises `ModelError` if the file is shorter than its header says.

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
        found = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        entries = {name: _entry.decode(raw) for name, raw in found.items() if name != "__metadata__"}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(
            f"{broken} header cannot be read ({in_one_line(error)}); download it again"
        ) from error
    if wrong := [name for name, entry in entries.items() if entry.data_offsets[0] > entry.data_offsets[1]]:
        raise ModelError(
            f"{broken} header says that {excerpt(wrong[0])} ends before it begins; download it again"
        )
    data = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    _check_length(file, 8 + length + data)
    return entries, data


def _check_length(file: Path, expected: int) -> None:
    actual = file.stat().st_size
    if actual < expected:
        raise ModelError(
            f"{file.name} in {file.parent} is truncated: it has {actual:,} of at least {expected:,} bytes, "
            f"{expected - actual:,} bytes are missing; download this file again"
        )


def fingerprint(folder: Path) -> str:
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

    for name in _CONFIGS:
        file = folder / name
        add(name.encode())
        add(file.read_bytes() if file.is_file() else b"")
    for file in weight_files(folder):
        size = file.stat().st_size
        add(file.name.encode())
        add(str(size).encode())
        with file.open("rb", buffering=0) as stream:
            length = int.from_bytes(stream.read(8), "little")
            start = min(size, 8 + min(length, _MAX_HEADER))  # a damaged file may say anything
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

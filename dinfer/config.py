"""The parameters of a run: frozen, and validated once. Messages say what was given and what is allowed.

Values may come as text (command line), as TOML, or as Python objects; `Config.of` converts. Nothing here
looks at a checkpoint or a device: what can only be known there is checked there.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from dinfer.errors import DinferError

Schedule = Literal["pipelined", "lockstep", "batched"]

SyncStrategy = Literal["pairwise", "ring"]

DeviceMode = Literal["single_node", "multi_node"]

Backend = Literal["auto", "gloo", "nccl"]

OnCorruption = Literal["record", "pause", "fail"]

DType = Literal["auto", "float32", "bfloat16", "float16"]

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class ConfigError(DinferError, ValueError):
    """A parameter, or two that do not go together; the message says what to do."""


def _parameter(default: Any, text: str, *, low: float | None = None, high: float | None = None) -> Any:
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Field names are the flags of `dinfer run` and the keys of its TOML file."""

    model_path: str = _parameter(
        "demo", "folder of a checkpoint, or 'demo' for the one that comes with dinfer"
    )
    prompt: str = _parameter("", "the text to go on from")
    prompt_file: str = _parameter("", "a UTF-8 file that holds the prompt")
    prompt_ids: tuple[int, ...] = _parameter(
        (), "the prompt as token ids, such as 5,17,3: needs no tokenizer"
    )
    chat: bool = _parameter(False, "put the prompt through the checkpoint's chat template")
    world_size: int = _parameter(3, "number of ranks", low=1)
    layer_split: tuple[int, ...] = _parameter(
        (), "first layer of every stage but the first, such as 14,28 for 3 ranks; even by default"
    )
    chunk_size: int = _parameter(128, "tokens per chunk of the prompt", low=1)
    sync_strategy: SyncStrategy = _parameter("pairwise", "who passes a block to whom")
    schedule: Schedule = _parameter("pipelined", "the rule that lays ops on lanes")
    unsafe: bool = _parameter(False, "run even a plan that verify has refuted")
    device_mode: DeviceMode = _parameter(
        "single_node", "single_node: all ranks on this machine; multi_node: one on each"
    )
    gpu_ids: tuple[int, ...] = _parameter((), "the GPU of each rank, such as 0,1,2; none: the CPU")
    backend: Backend = _parameter(
        "auto", "gloo or nccl; auto: nccl for ranks on one machine that have a GPU each, otherwise gloo"
    )
    master_addr: str = _parameter("127.0.0.1", "address at which the ranks meet")
    master_port: int = _parameter(0, "port at which the ranks meet; 0: a free one", low=0, high=65535)
    dtype: DType = _parameter("auto", "dtype of weights and KV; auto: the checkpoint's own")
    threads: int = _parameter(0, "CPU threads of each rank; 0: the cores shared out", low=0)
    max_new_tokens: int = _parameter(50, "tokens to generate at most", low=1)
    temperature: float = _parameter(0.0, "0: greedy", low=0)
    top_k: int = _parameter(0, "sample from the k most likely tokens; 0: all", low=0)
    top_p: float = _parameter(1.0, "sample from the most likely tokens of this total probability", high=1)
    seed: int = _parameter(0, "seed of sampling", low=0)
    digests: bool = _parameter(True, "digest every block, and check it on arrival and before decode")
    on_corruption: OnCorruption = _parameter(
        "record", "what to do about a block whose bytes have changed; pause: in a session only"
    )
    start_timeout: float = _parameter(180.0, "seconds that ranks may take to start and load", low=1)
    timeout: float = _parameter(60.0, "seconds without progress after which the run is ended", low=1)
    log_dir: str = _parameter("dinfer-logs", "folder for one log file per rank")
    log_level: LogLevel = _parameter("INFO", "DEBUG shows every op")

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_range(item.name, getattr(self, item.name), item.metadata["low"], item.metadata["high"])
        given = [name for name in ("prompt", "prompt_file", "prompt_ids") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} are given; one of them is the prompt: leave the others out."
            )
        if self.layer_split and len(self.layer_split) != self.world_size - 1:
            raise ConfigError(
                f"layer_split has {len(self.layer_split)} numbers for {self.world_size} ranks; it takes "
                f"{self.world_size - 1}: the first layer of every stage but the first."
            )
        if self.gpu_ids and len(self.gpu_ids) != self.world_size:
            raise ConfigError(
                f"world_size is {self.world_size} but gpu_ids names {len(self.gpu_ids)}; give one GPU id per "
                "rank (the same id may stand for several ranks)."
            )
        for name in ("prompt_ids", "layer_split", "gpu_ids"):
            if any(number < 0 for number in getattr(self, name)):
                raise ConfigError(f"{name} is {list(getattr(self, name))}; its numbers must be at least 0.")
        if self.on_corruption != "record" and not self.digests:
            raise ConfigError(
                f"on_corruption is {self.on_corruption}, but without digests nothing would be found: leave one out."
            )
        if self.top_p <= 0:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1: all tokens).")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """A config from names and values, the values possibly as text. Raises ConfigError."""
        return cls(**{name: _convert(name, value) for name, value in values.items()})

    @classmethod
    def from_toml(cls, path: str | Path, **changes: Any) -> Self:
        """The config that a TOML file describes, with `changes` on top of it. Raises ConfigError."""
        return cls.of({**read_toml(path), **changes})

    def with_(self, **changes: Any) -> Self:
        return replace(self, **{name: _convert(name, value) for name, value in changes.items()})

    def prompt_text(self) -> str:
        """The prompt, from `prompt` or `prompt_file`. Raises ConfigError."""
        if not self.prompt_file:
            return self.prompt
        try:
            return Path(self.prompt_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"prompt_file {self.prompt_file!r} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            message = f"prompt_file {self.prompt_file!r} is not UTF-8 text; save it as UTF-8."
            raise ConfigError(message) from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a run's TOML file. Raises ConfigError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} is not valid TOML: {error}.") from None


def nearest(name: str, known: list[str]) -> str:
    """` Did you mean …?` for a name that is not known, or nothing."""
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _check_range(name: str, value: Any, low: float | None, high: float | None) -> None:
    if low is not None and value < low:
        raise ConfigError(f"{name} is {value}; it must be at least {low}.")
    if high is not None and value > high:
        raise ConfigError(f"{name} is {value}; it must be at most {high}.")


def _convert(name: str, value: Any) -> Any:
    kinds = get_type_hints(Config)
    if name not in kinds:
        raise ConfigError(
            f"there is no parameter {name!r}.{nearest(name, list(kinds))} Known are: {', '.join(kinds)}."
        )
    kind = kinds[name]
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if value not in allowed:
            raise ConfigError(
                f"{name} is {value!r}; it must be one of {', '.join(allowed)}."
                f"{nearest(str(value), list(allowed))}"
            )
        return value
    if get_origin(kind) is tuple:
        return whole_numbers(name, value)
    scalar = _scalar(name, value, kind)
    return _whole_text(scalar) if name == "prompt" else scalar


def _scalar(name: str, value: Any, kind: type) -> Any:
    described = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    truths = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        if kind is bool:
            return value if isinstance(value, bool) else truths[str(value).lower()]
        if kind is str:
            if not isinstance(value, (str, Path)):
                raise ValueError
            return str(value)
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        number = kind(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise ConfigError(f"{name} is {value!r}; it must be {described}.") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number.")
    return number


def _whole_text(prompt: str) -> str:
    """The prompt; where Python has read an argument's bytes as ASCII (in a C locale), as the UTF-8 that they are."""
    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise ConfigError(f"prompt is {prompt!r}, which is not UTF-8 text: give it as UTF-8.") from None


def whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    """The numbers in `0,1,2`, or in a list. Raises ConfigError."""
    try:
        parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
        if any(isinstance(part, (bool, float)) for part in parts):
            raise ValueError
        return tuple(int(part) for part in parts if str(part).strip())
    except (ValueError, TypeError):
        raise ConfigError(
            f"{name} is {value!r}; it must be whole numbers with commas between them, such as 0,1,2."
        ) from None

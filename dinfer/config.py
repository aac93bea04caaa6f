"""The parameters of a run: frozen, and validated once. Messages name the given value and the allowed ones.

Values may come as text (command line), from TOML, or as Python objects; `Config.of` converts them. Nothing here reads a
checkpoint or looks for a device: `job` checks what depends on them.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from dinfer.arguments import nearest
from dinfer.codec.choice import ABOUT, Codec, CodecError
from dinfer.errors import DinferError, excerpt
from dinfer.files import FileError, as_text, read_bytes

MAX_TOML = 1 << 17
"""bytes, as many as Linux allows one argument of a command; for hostile keys, tomllib takes quadratic time"""

MAX_PROMPT = 1 << 26
"""bytes: 16 million tokens or so"""

Schedule = Literal["pipelined", "lockstep", "batched"]

SyncStrategy = Literal["pairwise", "ring"]

DeviceMode = Literal["single_node", "multi_node"]

Backend = Literal["auto", "gloo", "nccl", "ipc"]

OnCorruption = Literal["record", "pause", "fail"]

KernelChoice = Literal["auto", "exact", "graph", "compiled"]

DType = Literal["auto", "float32", "bfloat16", "float16"]

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


LARGEST = 2**31 - 1
"""of a number of tokens"""

MOST_RANKS = 9_999

LONGEST_S = 31_536_000.0
"""a year: threads cannot wait for centuries"""


class ConfigError(DinferError, ValueError):
    """A parameter is out of range, or two do not go together; the message says what to do."""


def _parameter(default: Any, text: str, *, low: float | None = None, high: float | None = None) -> Any:
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The parameters of one run. Field names are the flags of `dinfer run` and the keys of its TOML file.

    Raises ConfigError for values that are out of range or do not go together.
    """

    model_path: str = _parameter("demo", "folder of a checkpoint, or 'demo' for the built-in model")
    prompt: str = _parameter("", "the prompt as text")
    prompt_file: str = _parameter("", "a UTF-8 file with the prompt; a newline at its end is dropped")
    prompt_ids: tuple[int, ...] = _parameter(
        (), "the prompt as token ids, such as 5,17,3; needs no tokenizer"
    )
    chat: bool = _parameter(False, "apply the checkpoint's chat template to the prompt")
    world_size: int = _parameter(3, "number of ranks", low=1, high=MOST_RANKS)
    layer_split: tuple[int, ...] = _parameter(
        (), "first layer of each stage from the second on, such as 14,28 for 3 ranks; if not given, even"
    )
    chunk_size: int = _parameter(128, "tokens per chunk of the prompt", low=1, high=LARGEST)
    sync_strategy: SyncStrategy = _parameter(
        "pairwise",
        "how blocks reach every rank: pairwise: the owner sends to each; ring: each rank passes them on to the next",
    )
    schedule: Schedule = _parameter(
        "pipelined",
        "how work is ordered: pipelined: ranks work on different chunks at once; lockstep: all sync after each layer; "
        "batched: after each stage, which can deadlock",
    )
    codec: str = _parameter(
        "none",
        f"what blocks are sent as: {', '.join(ABOUT)}; or K and V by one each: k=int8,v=fp8; all but none and lossless "
        "lose precision",
    )
    unsafe: bool = _parameter(False, "run a plan even if verify refutes it")
    device_mode: DeviceMode = _parameter(
        "single_node", "single_node: all ranks on this machine; multi_node: one on each"
    )
    gpu_ids: tuple[int, ...] = _parameter((), "the GPU of each rank, such as 0,1,2; empty: CPU")
    backend: Backend = _parameter(
        "auto",
        "nccl: a GPU each; ipc: one GPU for all; gloo: any; auto: nccl if one machine has a GPU for each, else gloo",
    )
    master_addr: str = _parameter("127.0.0.1", "address at which the ranks meet")
    master_port: int = _parameter(0, "port at which the ranks meet; 0: any free port", low=0, high=65535)
    dtype: DType = _parameter(
        "auto", "dtype of weights and KV: float32, bfloat16 or float16; auto: the checkpoint's own"
    )
    kernels: KernelChoice = _parameter(
        "auto",
        "exact: transformers' own; graph: its layers as CUDA graphs; compiled: those, compiled; auto: the fastest that "
        "the model allows on a GPU, exact on a CPU",
    )
    threads: int = _parameter(
        0, "CPU threads of each rank; 0: the cores divided by the ranks", low=0, high=4096
    )
    max_new_tokens: int = _parameter(50, "most tokens to generate", low=1, high=LARGEST)
    temperature: float = _parameter(0.0, "0: greedy", low=0)
    top_k: int = _parameter(0, "sample from the k most likely tokens; 0: all", low=0, high=LARGEST)
    top_p: float = _parameter(1.0, "sample from the most likely tokens of this total probability", high=1)
    seed: int = _parameter(0, "seed of sampling", low=0, high=2**63 - 1)
    digests: bool = _parameter(
        True, "compute digests of every block and check them on arrival and before decode"
    )
    on_corruption: OnCorruption = _parameter(
        "record",
        "what to do if a block's bytes changed: record: warn and go on; fail: end the run; pause: only in a session",
    )
    start_timeout: float = _parameter(
        180.0, "seconds in which the ranks must start and load", low=1, high=LONGEST_S
    )
    timeout: float = _parameter(
        60.0, "seconds without progress after which the run ends", low=1, high=LONGEST_S
    )
    log_dir: str = _parameter("dinfer-logs", "each run gets a folder here, with a log file for each rank")
    log_level: LogLevel = _parameter("INFO", "DEBUG (shows every op), INFO, WARNING or ERROR")

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_range(item.name, getattr(self, item.name), item.metadata["low"], item.metadata["high"])
        given = [name for name in ("prompt", "prompt_file", "prompt_ids") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} are given, but a run has one prompt: leave the others out."
            )
        if self.layer_split and len(self.layer_split) != self.world_size - 1:
            raise ConfigError(layer_split_error(len(self.layer_split), self.world_size))
        if self.gpu_ids and len(self.gpu_ids) != self.world_size:
            raise ConfigError(
                f"world_size is {self.world_size} but gpu_ids names {len(self.gpu_ids)}; give one GPU id per rank "
                "(ranks may share a GPU)."
            )
        for name in ("prompt_ids", "layer_split", "gpu_ids"):
            if any(not 0 <= number <= LARGEST for number in getattr(self, name)):
                given_numbers = excerpt(list(getattr(self, name)), 200)
                raise ConfigError(f"{name} is {given_numbers}; its numbers must be from 0 to {LARGEST}.")
        if self.on_corruption != "record" and not self.digests:
            raise ConfigError(
                f"on_corruption is {self.on_corruption}, but digests is off, so no corruption is detected: change one."
            )
        if self.kernels in ("graph", "compiled") and not self.gpu_ids:
            raise ConfigError(
                f"kernels is {self.kernels}, which needs a GPU for each rank, but gpu_ids is empty: give gpu_ids, or "
                "kernels exact or auto."
            )
        _codec(self.codec)
        if self.top_p <= 0:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1: all tokens).")

    @property
    def codec_text(self) -> str:
        """For one-line descriptions of a run: `, codec int8`; "" for none."""
        return "" if self.codec == "none" else f", codec {self.codec}"

    @property
    def exact_stages(self) -> int:
        """With a lossy codec, by how many ranks the KV before it is shared out; 0 without."""
        return self.world_size if Codec.of(self.codec).is_lossy else 0

    @property
    def uses_streams(self) -> bool:
        """Whether ranks issue a lowered plan to CUDA streams, once the backend is chosen."""
        return self.backend in ("nccl", "ipc")

    @property
    def wants_graphs(self) -> bool:
        """Whether layers are to run as CUDA graphs where the model allows it."""
        return self.kernels != "exact" and bool(self.gpu_ids)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """A config from parameter names and values; values may be text. Raises ConfigError."""
        return cls(**{name: _convert(name, value) for name, value in values.items()})

    @classmethod
    def from_toml(cls, path: str | Path, **changes: Any) -> Self:
        """The config in a TOML file, overridden by `changes`. Raises ConfigError."""
        return cls.of({**read_toml(path), **changes})

    def with_(self, **changes: Any) -> Self:
        """A copy with these parameters changed. Raises ConfigError."""
        return replace(self, **{name: _convert(name, value) for name, value in changes.items()})

    def prompt_text(self) -> str:
        """The text of `prompt` or `prompt_file`, a file's without what editors add to it: a byte-order mark, and the
        newline that ends its last line. Raises ConfigError if the file cannot be read."""
        if not self.prompt_file:
            return self.prompt
        try:
            text = as_text(read_bytes(self.prompt_file, MAX_PROMPT))
        except OSError as error:
            raise ConfigError(f"prompt_file {self.prompt_file!r} cannot be read: {error.strerror}.") from None
        except FileError as error:
            raise ConfigError(
                f"prompt_file {self.prompt_file!r} cannot be taken: {error}. It must be UTF-8 text of at most "
                f"{MAX_PROMPT:,} bytes."
            ) from None
        return text.removesuffix("\n")


def layer_split_error(given: int, world_size: int) -> str:
    """The message for a `layer_split` of `given` numbers where `world_size` ranks need another count."""
    if world_size == 1:
        return f"layer_split takes no numbers for 1 rank; got {given}: leave it out."
    stages = {2: "stage 1", 3: "stages 1 and 2"}.get(world_size, f"stages 1 to {world_size - 1}")
    count = f"{world_size - 1} number{'s' * (world_size > 2)}"
    return f"layer_split takes {count} for {world_size} ranks (the first layer of {stages}); got {given}."


def read_toml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a run's TOML file. Raises ConfigError."""
    try:
        data = read_bytes(path, MAX_TOML)
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}.") from None
    except FileError as error:
        raise ConfigError(
            f"config file {str(path)!r} cannot be read: {error}. A long prompt belongs into a file of its own: "
            "prompt_file."
        ) from None
    try:
        return tomllib.loads(as_text(data))
    except RecursionError:
        raise ConfigError(f"config file {str(path)!r} is not valid TOML: it is nested too deeply.") from None
    except ValueError as error:  # also what is no UTF-8, and a number of more digits than Python converts
        raise ConfigError(f"config file {str(path)!r} is not valid TOML: {error}.") from None


def _check_range(name: str, value: Any, low: float | None, high: float | None) -> None:
    if low is not None and value < low:
        raise ConfigError(f"{name} is {excerpt(value)}; it must be at least {low}.")
    if high is not None and value > high:
        raise ConfigError(f"{name} is {excerpt(value)}; it must be at most {high}.")


def check_known(names: Iterable[str], others: Sequence[str] = ()) -> None:
    """Raises ConfigError for a name that is none of a run's parameters, nor one of these others."""
    known = [*others, *(one.name for one in fields(Config))]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"unknown parameter {excerpt(name)}.{nearest(name, known)} The parameters are {', '.join(known)}."
            )


def _convert(name: str, value: Any) -> Any:
    check_known([name])
    kinds = get_type_hints(Config)
    kind = kinds[name]
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if value not in allowed:
            raise ConfigError(
                f"{name} is {excerpt(value)}; it must be one of {', '.join(allowed)}."
                f"{nearest(value, list(allowed)) if isinstance(value, str) else ''}"
            )
        return value
    if get_origin(kind) is tuple:
        return whole_numbers(name, value)
    scalar = _scalar(name, value, kind)
    if name == "prompt":
        return _utf8_text(scalar)
    if name == "codec":
        return _codec(scalar)
    if isinstance(scalar, str) and "\0" in scalar:
        raise ConfigError(f"{name} is {excerpt(scalar)}; it must not contain the character NUL.")
    return scalar


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
        raise ConfigError(f"{name} is {excerpt(value)}; it must be {described}.") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ConfigError(f"{name} is {excerpt(value)}; it must be a finite number.")
    return number


def _codec(value: str) -> str:
    """A codec in its one spelling. Raises ConfigError."""
    try:
        return str(Codec.of(value))
    except CodecError as error:
        raise ConfigError(str(error)) from None


def _utf8_text(prompt: str) -> str:
    """The prompt as UTF-8, also if Python has read the argument's bytes as ASCII (in a C locale)."""
    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise ConfigError(
            f"prompt is {excerpt(prompt)}, which is not UTF-8 text: give it as UTF-8."
        ) from None


def whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    """The whole numbers in a text such as `0,1,2`, or in a list. Raises ConfigError."""
    try:
        parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
        if any(isinstance(part, (bool, float)) for part in parts):
            raise ValueError
        return tuple(int(part) for part in parts if str(part).strip())
    except (ValueError, TypeError):
        raise ConfigError(
            f"{name} is {excerpt(value)}; it must be whole numbers with commas between them, such as 0,1,2."
        ) from None

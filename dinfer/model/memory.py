"""How much memory ranks need for a model and a prompt, and how much is free, before anything is loaded.

Every rank decodes with the whole model, so every rank holds all layers. The figures come from the checkpoint's sizes;
the working memory of one layer for one chunk is an estimate, and Python and torch (a few hundred MiB a process) are not
included. Importing this module, and asking it about a CPU, does not import torch.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from dinfer.errors import ModelError
from dinfer.model.checkpoint import Spec
from dinfer.model.families import family_of

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""bytes of one number, by dtype"""


GRAPH_BYTES = 18 << 20
"""what the CUDA graph of one layer takes, and its share of what was compiled: measured on one H200 (Qwen3-4B's shape,
36 layers, chunks of 128: 0.62 GiB for one kind of graphs)"""


@dataclass(frozen=True)
class MemoryNeed:
    """What one rank needs, in bytes: weights, KV, hidden states including the working memory of a layer; where layers
    run as CUDA graphs, these; and, with a lossy codec, the exact KV of its own layers."""

    weights_bytes: int
    kv_bytes: int
    hidden_bytes: int
    graphs_bytes: int = 0
    exact_bytes: int = 0

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        return self.weights_bytes + self.kv_bytes + self.hidden_bytes + self.graphs_bytes + self.exact_bytes

    def __str__(self) -> str:
        """Each part, for example `weights 7.5 GiB, KV 144.0 MiB, hidden states 4.9 MiB`."""
        graphs = f", graphs {size_text(self.graphs_bytes)}" if self.graphs_bytes else ""
        kv, hidden = size_text(self.kv_bytes), size_text(self.hidden_bytes)
        exact = f", KV before its codec {size_text(self.exact_bytes)}" if self.exact_bytes else ""
        return f"weights {size_text(self.weights_bytes)}, KV {kv}, hidden states {hidden}{graphs}{exact}"


def need(
    spec: Spec, dtype: str, tokens: int, chunk_size: int = 0, *, graphs: bool = False, stages: int = 0
) -> MemoryNeed:
    """What a rank needs in `dtype` ("auto": the checkpoint's) for `tokens` tokens of prompt and decode.

    `hidden_bytes` covers the hidden states that enter the stage, which are kept for going back, and, with a
    `chunk_size`, the working memory of a layer for the last chunk. `graphs`: layers run as CUDA graphs;
    `stages`: with a lossy codec, their number, by which exact KV is shared out. Raises `ModelError` for an unknown
    dtype.
    """
    name = _resolved(spec, dtype)
    if name not in BYTES:
        raise ModelError(f"dtype {name!r} is unknown; give one of {', '.join(BYTES)}")
    size = BYTES[name]
    layer_bytes = tokens * 2 * spec.kv_heads * spec.head_dim * size
    return MemoryNeed(
        weights_bytes=spec.parameters * size,
        kv_bytes=spec.layers * layer_bytes,
        hidden_bytes=tokens * spec.hidden_size * size + _working(spec, size, tokens, min(chunk_size, tokens)),
        graphs_bytes=spec.layers * GRAPH_BYTES if graphs else 0,
        exact_bytes=-(-spec.layers // stages) * layer_bytes if stages else 0,
    )


def check_memory(wanted: "MemoryDemand") -> None:
    """Raise `ModelError` if ranks need more memory than is free on their device.

    Call it once for all ranks, before the first of them loads.
    """
    available = free(wanted.device)
    if (total := wanted.bytes()) <= available:
        return
    spec, ranks = wanted.spec, wanted.ranks
    shared = " One copy of the weights is for all." if ranks > 1 and wanted.shares_weights else ""
    asked = (
        f"{ranks} rank{'s' * (ranks > 1)} on {wanted.device} with {wanted.tokens:,} tokens in "
        f"{_resolved(spec, wanted.dtype)} need {size_text(total)}; {size_text(available)} are free, "
        f"{size_text(total - available)} too little. "
        f"Each rank holds all {spec.layers} layers, for decode: {wanted.of_a_rank}.{shared} "
    )
    if remedies := _remedies(wanted, available):
        raise ModelError(f"{asked}One of these would be enough: {'; '.join(remedies)}.")
    raise ModelError(
        f"{asked}No single change is enough: use a smaller model, or a machine with more memory."
    )


@dataclass(frozen=True)
class MemoryDemand:
    """What `ranks` ranks that share one device need together. `graphs`, `stages`: see `need`."""

    spec: Spec
    dtype: str
    tokens: int
    ranks: int = 1
    device: str = "cpu"
    chunk_size: int = 0
    graphs: bool = False
    stages: int = 0

    @property
    def of_a_rank(self) -> MemoryNeed:
        """What each of the ranks needs."""
        size = self.tokens, self.chunk_size
        return need(self.spec, self.dtype, *size, graphs=self.graphs, stages=self.stages)

    def bytes(self, **changes: Any) -> int:
        """The bytes needed, with any of these fields changed."""
        that = replace(self, **changes)
        one = that.of_a_rank
        copies = 1 if that.shares_weights else that.ranks
        return copies * one.weights_bytes + that.ranks * (one.total - one.weights_bytes)

    @property
    def shares_weights(self) -> bool:
        """Whether ranks share one copy of the weights: on a CPU, if they are views of the files."""
        as_stored = _resolved(self.spec, self.dtype) == self.spec.stored_dtype
        return self.device == "cpu" and as_stored and not family_of(self.spec).rebuilds_weights


def _resolved(spec: Spec, dtype: str) -> str:
    return spec.dtype if dtype == "auto" else dtype


def _working(spec: Spec, size: int, tokens: int, chunk: int) -> int:
    """Estimate what a layer holds at once for `chunk` tokens, in bytes: hidden states, Q, K, V, MLP, mask or scores.

    SDPA turns a boolean mask into numbers; eager attention holds all heads' scores in float32 and twice in the dtype.
    """
    of_a_token = 4 * spec.hidden_size + 2 * (spec.heads + spec.kv_heads) * spec.head_dim
    activations = chunk * (of_a_token + 3 * spec.intermediate_size) * size
    eager = family_of(spec).attention == "eager"
    return activations + chunk * tokens * (spec.heads * (4 + 2 * size) if eager else 1 + size)


def out_of_memory_text(one: MemoryDemand, asked: int | None, available: int | None) -> str:
    """The message for a rank that ran out of memory: the failed allocation, what was free, and each single change that
    would do. `asked` and `available` are bytes, None if unknown."""
    size = "an unknown amount" if asked is None else size_text(asked)
    known = "" if available is None else f", {size_text(available)} were free"
    text = (
        f"Out of memory on {one.device}: {size} was asked for{known}. By calculation this rank needs "
        f"{one.of_a_rank}. "
    )
    # An allocation may fail although memory is free: by a limit of the process, or by fragmentation.
    short = asked if asked is None or available is None or available >= asked else asked - available
    if short is None:
        return text + "Lower chunk_size or max_new_tokens, shorten the prompt, or use dtype bfloat16."
    if remedies := _remedies(one, one.bytes() - short):
        return text + f"One of these would save the missing {size_text(short)}: " + "; ".join(remedies) + "."
    return text + (
        f"No single change saves the missing {size_text(short)}: lower chunk_size, dtype and length together, or use "
        "fewer ranks here, or more memory."
    )


def _remedies(wanted: MemoryDemand, available: int) -> list[str]:
    """Each single change after which the need fits into `available` bytes."""

    def largest(field: str, high: int) -> int:
        """The largest value of this field from 1 to `high` that fits, 0 if none does."""
        return bisect_left(range(1, high + 1), True, key=lambda n: wanted.bytes(**{field: n}) > available)

    ways = []
    if (half := wanted.bytes(dtype="bfloat16")) <= available:
        ways.append(f"dtype bfloat16 (needs {size_text(half)})")
    if wanted.graphs and (slower := wanted.bytes(graphs=False)) <= available:
        ways.append(f"kernels exact (slower, needs {size_text(slower)})")
    if tokens := largest("tokens", wanted.tokens - 1):
        ways.append(f"prompt and new tokens together at most {tokens:,}, {wanted.tokens - tokens:,} fewer")
    if chunk := largest("chunk_size", wanted.chunk_size - 1):
        ways.append(f"chunk_size at most {chunk:,} instead of {wanted.chunk_size:,}")
    if ranks := largest("ranks", wanted.ranks - 1):
        ways.append(f"at most {ranks} rank{'s' * (ranks > 1)} here")
    return ways


def size_text(count: int) -> str:
    """A byte count as text: "7.5 GiB", "144.0 KiB"."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def free(device: str = "cpu", root: Path = Path("/")) -> int:
    """The free bytes of "cpu" or "cuda:N". Raises `ModelError` for an unknown CUDA device.

    On a CPU: what can be allocated without swapping, by psutil, or what the limits of this process's cgroups (a
    container) leave, whichever is less; psutil does not know cgroups. `root`: where their /proc and /sys are.
    """
    if device == "cpu":
        return max(0, min([psutil.virtual_memory().available, *_of_cgroups(root)]))
    import torch

    try:
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(f"device {device!r} cannot be asked for its free memory: {error}") from error


def _of_cgroups(root: Path) -> Iterator[int]:
    """What each cgroup of this process, v1 or v2, and each one above leaves, page cache that it can drop included."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        for group in (top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)):
            limit, usage = (_read(group / name).strip() for name in names[:2])
            if (
                limit.isdigit() and usage.isdigit()
            ):  # a container sees the top alone, and a limit may be "max"
                counts = (line.split() for line in _read(group / "memory.stat").splitlines())
                cached = sum(int(count) for name, count in counts if name == names[2])
                yield int(limit) - int(usage) + cached


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""

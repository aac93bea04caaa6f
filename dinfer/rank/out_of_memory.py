"""Out of memory while a rank runs: what was asked for, what was free, and which parameter to change by how much.

What does not fit by calculation is refused before anything loads; this is for what was not foreseen.
"""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dinfer.config import Config
from dinfer.errors import DinferError
from dinfer.model.checkpoint import check
from dinfer.model.errors import ModelError
from dinfer.model.free import free
from dinfer.model.memory import MemoryDemand, out_of_memory_text

_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)

_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

_SIGNS = ("DefaultCPUAllocator: can't allocate", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(DinferError, RuntimeError):
    """A rank asked for memory that was not there."""


@contextmanager
def explained(config: Config, ids: Sequence[int], device: str) -> Iterator[None]:
    """Raises OutOfMemory, with what to change, for whatever comes of a lack of memory inside."""
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        told = (
            str(error) if type(error).__module__.startswith("dinfer") else f"{type(error).__name__}: {error}"
        )
        raise OutOfMemory(f"{told.splitlines()[0]}\n{_advice(error, config, len(ids), device)}") from error


def is_shortage(error: BaseException) -> bool:
    """Whether this error, or the one that it came of, is a lack of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
        return True
    return error.__cause__ is not None and is_shortage(error.__cause__)


def asked_bytes(text: str) -> int | None:
    """What torch says that it tried to allocate."""
    found = _ASKED.search(text)
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else None


def _advice(error: Exception, config: Config, tokens: int, device: str) -> str:
    try:
        spec, available = check(config.model_path), free(device)
    except ModelError as unknown:
        return f"Memory ran out on {device}; what would be enough cannot be worked out: {unknown}"
    length = min(tokens + config.max_new_tokens, spec.max_positions)
    demand = MemoryDemand(spec, config.dtype, length, 1, device, config.chunk_size)
    return out_of_memory_text(demand, asked_bytes(str(error)), available)

"""Errors of a rank, for its session: one report that tells cause from consequence, and out of memory as advice.

What cannot fit by calculation is refused before anything loads; the advice is for the rest.
"""

import errno
import logging
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dinfer.config import Config
from dinfer.engine.lanes import OpFailed
from dinfer.errors import DinferError, ModelError
from dinfer.messages import Failed, UnexpectedHeader
from dinfer.model.checkpoint import check
from dinfer.model.memory import MemoryDemand, free, out_of_memory_text
from dinfer.rank.logs import log_trouble
from dinfer.transport.gloo import CommError
from dinfer.transport.header import TransferError

log = logging.getLogger("dinfer")


def error_text(error: BaseException) -> str:
    """Its message; dinfer's own errors need no type before it."""
    return str(error) if type(error).__module__.startswith("dinfer") else f"{type(error).__name__}: {error}"


def describe(error: BaseException) -> Failed:
    """The report about an error that ends this rank's run."""
    cause = error.__cause__ or error
    unexpected = None
    if isinstance(cause, TransferError) and (came := cause.came):
        what, chunk, layer = came.value
        unexpected = UnexpectedHeader(
            (what, chunk, layer), came.tokens, came.nbytes, came.plan_id, cause.here
        )
    return Failed(
        message=error_text(error),
        error=type(cause).__name__,
        secondary=isinstance(error, CommError) or isinstance(cause, CommError),
        traceback="".join(traceback.format_exception(error)),
        log_trouble=log_trouble(log),
        cause=f"{type(cause).__name__}: {cause}",
        op=str(error.op) if isinstance(error, OpFailed) else "",
        lane=error.lane if isinstance(error, OpFailed) else "",
        came=unexpected,
    )


_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SIGNS = ("DefaultCPUAllocator: can't allocate", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(DinferError, RuntimeError):
    """A rank has run out of memory; the message says what to change."""


@contextmanager
def explained(config: Config, ids: Sequence[int], device: str) -> Iterator[None]:
    """Turns an error inside that comes from a lack of memory into OutOfMemory."""
    try:
        yield
    except Exception as error:  # a shortage may be the cause of any error
        if not is_shortage(error):
            raise
        first_line = error_text(error).splitlines()[0]
        raise OutOfMemory(f"{first_line}\n{_advice(error, config, len(ids), device)}") from error


def is_shortage(error: BaseException) -> bool:
    """Whether this error, or its cause, is a lack of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
        return True
    return error.__cause__ is not None and is_shortage(error.__cause__)


def asked_bytes(text: str) -> int | None:
    """How many bytes torch says it has tried to allocate."""
    found = _ASKED.search(text)
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else None


def _advice(error: Exception, config: Config, tokens: int, device: str) -> str:
    try:
        spec, available = check(config.model_path), free(device)
    except ModelError as unknown:
        return f"Memory ran out on {device}; what would be enough cannot be worked out: {unknown}"
    length = min(tokens + config.max_new_tokens, spec.max_positions)
    demand = MemoryDemand(
        spec,
        config.dtype,
        length,
        1,
        device,
        config.chunk_size,
        config.wants_graphs,
        stages=config.exact_stages,
    )
    return out_of_memory_text(demand, asked_bytes(str(error)), available)

"""A rank's failure as what its session needs to tell causes from consequences."""

import logging
import traceback
from typing import TYPE_CHECKING, Any

from dinfer.rank.logs import log_trouble

if TYPE_CHECKING:
    from dinfer.transport.header import Header

log = logging.getLogger("dinfer")


def describe(error: BaseException) -> dict[str, Any]:
    """What a session needs to tell causes from consequences: `secondary` is what a lost peer does to others; `cause` is
    the original error, `op` and `lane` where it was raised, `came` the message because of which, where there is one."""
    from dinfer.engine.lanes import OpFailed
    from dinfer.transport.gloo import CommError
    from dinfer.transport.header import TransferError

    cause = error.__cause__ if error.__cause__ is not None else error
    return {
        "message": str(error)
        if type(error).__module__.startswith("dinfer")
        else f"{type(error).__name__}: {error}",
        "error": type(cause).__name__,
        "secondary": isinstance(error, CommError) or isinstance(cause, CommError),
        "traceback": "".join(traceback.format_exception(error)),
        "log_trouble": log_trouble(log),
        "cause": f"{type(cause).__name__}: {cause}",
        "op": str(error.op) if isinstance(error, OpFailed) else "",
        "lane": error.lane if isinstance(error, OpFailed) else "",
        "came": _came(cause.came, cause.here) if isinstance(cause, TransferError) and cause.came else None,
    }


def _came(header: "Header", here: int) -> dict[str, Any]:
    return {
        "value": list(header.value),
        "tokens": header.tokens,
        "nbytes": header.nbytes,
        "plan_id": header.plan_id,
        "here": here,
    }

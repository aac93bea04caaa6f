"""A rank's failure as what its session needs to tell causes from consequences."""

import logging
import traceback
from typing import TYPE_CHECKING

from dinfer.messages import Failed, UnexpectedHeader
from dinfer.rank.logs import log_trouble

if TYPE_CHECKING:
    from dinfer.transport.header import Header

log = logging.getLogger("dinfer")


def describe(error: BaseException) -> Failed:
    """The report about an error that ends this rank's run."""
    from dinfer.engine.lanes import OpFailed
    from dinfer.transport.gloo import CommError
    from dinfer.transport.header import TransferError

    cause = error.__cause__ if error.__cause__ is not None else error
    own = type(error).__module__.startswith("dinfer")
    return Failed(
        message=str(error) if own else f"{type(error).__name__}: {error}",
        error=type(cause).__name__,
        secondary=isinstance(error, CommError) or isinstance(cause, CommError),
        traceback="".join(traceback.format_exception(error)),
        log_trouble=log_trouble(log),
        cause=f"{type(cause).__name__}: {cause}",
        op=str(error.op) if isinstance(error, OpFailed) else "",
        lane=error.lane if isinstance(error, OpFailed) else "",
        came=_came(cause.came, cause.here) if isinstance(cause, TransferError) and cause.came else None,
    )


def _came(header: "Header", here: int) -> UnexpectedHeader:
    what, chunk, layer = header.value
    return UnexpectedHeader((what, chunk, layer), header.tokens, header.nbytes, header.plan_id, here)

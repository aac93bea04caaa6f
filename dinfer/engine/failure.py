"""A rank's failure as what its session needs to tell causes from consequences."""

import logging
import traceback
from typing import Any

from dinfer.engine.logfile import log_trouble

log = logging.getLogger("dinfer")


def describe(error: BaseException) -> dict[str, Any]:
    """What a session needs to tell causes from consequences: `secondary` is what a lost peer does to others."""
    from dinfer.engine.comm import CommError

    cause = error.__cause__ if error.__cause__ is not None else error
    return {
        "message": str(error)
        if type(error).__module__.startswith("dinfer")
        else f"{type(error).__name__}: {error}",
        "error": type(cause).__name__,
        "secondary": isinstance(error, CommError) or isinstance(cause, CommError),
        "traceback": "".join(traceback.format_exception(error)),
        "log_trouble": log_trouble(log),
    }

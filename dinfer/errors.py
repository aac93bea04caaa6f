"""The base of all errors whose message is for the user. Any other error is a bug in dinfer and keeps its traceback."""

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, ClassVar

from dinfer.severity import Severity

PACKAGE = __name__.split(".")[0]

LINES = 2
"""lines of a cell to show: the one that failed and the one before (with 1, IPython shows none in a notebook)"""


class DinferError(Exception):
    """An error whose message is all that the user needs.

    IPython shows it with the user's own lines and without dinfer's frames: `%tb verbose` shows those, `%debug` enters
    them, and any mode of `%xmode` except Context always shows them. Plain Python shows a full traceback.
    """

    severity: ClassVar[Severity] = Severity.ERROR

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of its own traceback, as the parts that it joins."""
        shell = ipython()
        if shell is None:
            return [f"{type(self).__name__}: {_with_causes(self)}"]
        formatter: Any = shell.InteractiveTB
        if formatter.mode != "Context":
            whole: list[str] = formatter.structured_traceback(type(self), self, self.__traceback__)
            return whole
        # A stand-in without a chain of causes: IPython would show each cause with all of its frames.
        stand_in = Exception(_with_causes(self))
        own: list[str] = formatter.structured_traceback(
            type(self), stand_in, _own(self.__traceback__), context=LINES
        )
        formatter.tb = self.__traceback__  # what %debug enters
        return own


def excerpt(given: object, most: int = 60) -> str:
    """How a message shows what was given, cut if it is long."""
    if isinstance(given, str):
        given = given[: most + 1]  # the repr of a long text takes a multiple of its memory
    try:
        text = repr(given)
    except ValueError:  # a number of more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def ipython() -> Any | None:
    """The IPython shell of this process, None without one."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


class NotPossible(DinferError, RuntimeError):
    """The call is not possible in this state; the message says why."""


class NoSuch(DinferError, IndexError, KeyError):
    """Unknown index or name; the message lists the valid ones."""

    __str__ = Exception.__str__  # KeyError's puts the message in quotes


class NoAnswer(DinferError, TimeoutError):
    """A rank has not answered in time."""


def _with_causes(error: BaseException) -> str:
    """The message, followed by those of its causes that it does not contain."""
    text = str(error)
    for cause in _causes(error):
        if str(cause) not in text:
            text += f"\ncaused by {type(cause).__name__}: {cause}"
    return text


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen = {id(error)}
    while (cause := error.__cause__) is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        error = cause


def _own(found: TracebackType | None) -> TracebackType | None:
    """The part of a traceback before dinfer's first frame."""
    if found is None or found.tb_frame.f_globals.get("__name__", "").split(".")[0] == PACKAGE:
        return None
    return TracebackType(_own(found.tb_next), found.tb_frame, found.tb_lasti, found.tb_lineno)


class ModelError(DinferError, ValueError):
    """A model, checkpoint, cache or prompt cannot be used; the message names the given value, the allowed ones and what
    to do."""

"""The errors that are answers: to a request that cannot be met, or to how a run stands. What they have in common.

An error that is none of these is a mistake in dinfer, and keeps its traceback everywhere.
"""

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

PACKAGE = __name__.split(".")[0]

LINES = 2
"""of a cell: the one that failed and the one before it (with 1, IPython shows none of a cell of a notebook)"""


class DinferError(Exception):
    """An error whose message is all that its user needs. In IPython it comes with the user's own lines, without the
    frames of dinfer under them; `%tb verbose` shows those too, `%debug` enters them, and in any mode of `%xmode` but
    Context they are always shown. Plain Python shows them as of any exception."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in place of its own traceback, as the parts that it joins."""
        shell = ipython()
        if shell is None:
            return [f"{type(self).__name__}: {_with_causes(self)}"]
        formatter: Any = shell.InteractiveTB
        if formatter.mode != "Context":
            whole: list[str] = formatter.structured_traceback(type(self), self, self.__traceback__)
            return whole
        # In place of the error, one that has no chain of causes: each of them would be shown with all of its frames.
        stand_in = Exception(_with_causes(self))
        own: list[str] = formatter.structured_traceback(
            type(self), stand_in, _own(self.__traceback__), context=LINES
        )
        formatter.tb = self.__traceback__  # what %debug enters
        return own


def ipython() -> Any | None:
    """The IPython shell of this process, if it is run by one."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


class NotPossible(DinferError, RuntimeError):
    """What was asked for cannot be had as things stand; the message says what is in the way."""


class NoSuch(DinferError, IndexError, KeyError):
    """A number or name that there is not; the message says which there are."""

    __str__ = Exception.__str__  # KeyError's shows the message between quotation marks


class NoAnswer(DinferError, TimeoutError):
    """Ranks have not answered in time."""


def _with_causes(error: BaseException) -> str:
    """The message, and those of the errors that it was raised from, unless it holds them."""
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
    """The part of a traceback that comes before dinfer's frames."""
    if found is None or found.tb_frame.f_globals.get("__name__", "").split(".")[0] == PACKAGE:
        return None
    return TracebackType(_own(found.tb_next), found.tb_frame, found.tb_lasti, found.tb_lineno)

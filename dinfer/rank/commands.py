"""Command tables: which function of a rank carries out which command.

A quick command is carried out at once, whatever the rank is doing; a slow one (loading, decoding) on a thread of its
own, where slow ones run one after another. What only looks has another thread: KV can be read while decode is blocked.
"""

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from dinfer.messages import Answer, Command, Ok, RankReport, Refused, Reply
from dinfer.rank.failure import error_text

C = TypeVar("C", bound=Command[Any])


class OnThread(StrEnum):
    """Where a rank carries out commands that it does not carry out at once."""

    SLOW = "slow commands"
    LOOKING = "looking"


class Handler(NamedTuple):
    """What carries out commands of one type: returns the answer, None for Ok. `thread`: None for at once."""

    kind: type[Command[Any]]
    function: Callable[[Any], Answer | None]
    thread: OnThread | None = None


CommandTable = dict[type[Command[Any]], Handler]


def quick(kind: type[C], function: Callable[[C], Answer | None]) -> Handler:
    """Carry out these commands at once."""
    return Handler(kind, function)


def slow(kind: type[C], function: Callable[[C], Answer | None]) -> Handler:
    """Carry out these commands, which may wait for files, devices or other ranks, on the thread for slow ones."""
    return Handler(kind, function, OnThread.SLOW)


def looking(kind: type[C], function: Callable[[C], Answer | None]) -> Handler:
    """Carry out these commands, which may compute but change nothing, on the thread for looking."""
    return Handler(kind, function, OnThread.LOOKING)


def table_of(handlers: Iterable[Handler]) -> CommandTable:
    return {handler.kind: handler for handler in handlers}


def answer(table: CommandTable, number: int, command: Command[Any]) -> RankReport:
    """Carry out request `number`; an error is an answer too, since the session must hear of it."""
    handler = table.get(type(command))
    if handler is None:
        return Refused(number, f"this rank has no command {type(command).__name__}")
    try:
        return Reply(number, handler.function(command) or Ok())
    except Exception as error:  # whatever it is: the thread must go on to answer the next command
        return Refused(number, error_text(error))

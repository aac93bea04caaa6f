"""Command tables: which function of a rank carries out which command.

A quick command is carried out at once, whatever the rank is doing; a slow one (loading, decoding) on a thread of its
own, where slow ones run one after another. Here are the commands that stop lanes; others are beside what they work on.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from dinfer.engine.lanes import LaneExecutor
from dinfer.messages import Answer, Command, Freeze, GetStand, Ok, RankReport, Refused, Release, Reply, Stand
from dinfer.plan.graph import Channel

C = TypeVar("C", bound=Command[Any])


class Handler(NamedTuple):
    """What carries out commands of one type. `slow`: it may wait for files, devices or other ranks."""

    kind: type[Command[Any]]
    function: Callable[[Any], Answer]
    slow: bool


CommandTable = dict[type[Command[Any]], Handler]


def quick(kind: type[C], function: Callable[[C], Answer]) -> Handler:
    """Carry out these commands at once."""
    return Handler(kind, function, slow=False)


def slow(kind: type[C], function: Callable[[C], Answer]) -> Handler:
    """Carry out these commands on the thread for slow ones."""
    return Handler(kind, function, slow=True)


def table_of(handlers: Iterable[Handler]) -> CommandTable:
    return {handler.kind: handler for handler in handlers}


def answer(table: CommandTable, number: int, command: Command[Any]) -> RankReport:
    """Carry out request `number`; an error is an answer too, since the session must hear of it."""
    handler = table.get(type(command))
    if handler is None:
        return Refused(number, f"this rank has no command {type(command).__name__}")
    try:
        return Reply(number, handler.function(command))
    except Exception as error:
        own = type(error).__module__.startswith("dinfer")
        return Refused(number, str(error) if own else f"{type(error).__name__}: {error}")


def stand_commands(executor: Callable[[], LaneExecutor]) -> list[Handler]:
    """Commands that stop lanes where they are, and let go of what waits for a peer."""

    def freeze(_: Freeze) -> Stand:
        return executor().freeze()

    def stand(_: GetStand) -> Stand:
        return executor().stand()

    def release(command: Release) -> Ok:
        executor().release([Channel(*channel) for channel in command.channels])
        return Ok()

    return [quick(Freeze, freeze), quick(GetStand, stand), quick(Release, release)]

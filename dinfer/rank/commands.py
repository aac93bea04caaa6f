"""Commands: what a session can have a rank do, as a table from name to function.

Messages are JSON objects. A quick command is answered at once, whatever the rank is doing; a slow one (loading,
decoding) has a thread of its own, where slow ones run one after another. Here is the table, and those commands that
move the lanes of one executor; the host adds its own.
"""

from collections.abc import Callable
from typing import NamedTuple

from dinfer.engine.board import Stand
from dinfer.engine.lanes import LaneExecutor
from dinfer.messages import Message
from dinfer.plan.graph import Channel

Function = Callable[[Message], Message]


class Command(NamedTuple):
    """`slow`: it may wait for files, devices or other ranks."""

    function: Function
    slow: bool = False


CommandTable = dict[str, Command]


def answer(command: Command, message: Message) -> Message:
    """What the command says; an error is an answer too: the line to the session must go on."""
    try:
        return command.function(message)
    except Exception as error:
        own = type(error).__module__.startswith("dinfer")
        return {"error": str(error) if own else f"{type(error).__name__}: {error}"}


def stand_fields(stand: Stand) -> Message:
    return {"positions": stand.positions, "started": stand.started, "limits": stand.limits}


def stand_of(message: Message) -> Stand:
    return Stand(tuple(message["positions"]), tuple(map(bool, message["started"])), tuple(message["limits"]))


def lane_commands(executor: Callable[[], LaneExecutor]) -> CommandTable:
    """Commands that move the lanes of whatever executor there is just then. `cut` is that of all ranks."""

    def limits(message: Message) -> Message:
        found = executor()
        found.set_limits(message["cut"][found.rank])
        return {}

    def freeze(_: Message) -> Message:
        return stand_fields(executor().freeze())

    def release(message: Message) -> Message:
        executor().release([Channel(*channel) for channel in message["channels"]])
        return {}

    def rewind(message: Message) -> Message:
        found = executor()
        found.rewind(message["cut"][found.rank])
        return {}

    return {
        "limits": Command(limits),
        "freeze": Command(freeze),
        "release": Command(release),
        "rewind": Command(rewind, slow=True),  # it computes hidden states anew
    }

"""Arming: a session's word to a rank about the faults that are to strike there."""

from collections.abc import Callable

from dinfer.engine.commands import Command, Message, Table, stand_fields
from dinfer.engine.engine import Engine
from dinfer.engine.faults import Strike
from dinfer.plan.faults import Fault


def fault_commands(
    engine: Callable[[], Engine], report: Callable[..., None], tell_edits: Callable[[list[str]], None]
) -> Table:
    """`faults`: all that are to strike from now on; `stand`: where the rank stands, without stopping it."""

    def tell(strike: Strike) -> None:
        report("note", note="fault", **strike._asdict())

    def arm(message: Message) -> Message:
        tell_edits(engine().arm([Fault.of(one) for one in message["faults"]], tell))
        return {}

    def stand(_: Message) -> Message:
        return stand_fields(engine().executor.stand())

    return {"faults": Command(arm, slow=True), "stand": Command(stand)}

"""Arming: a session's word to a rank about the faults that are to strike there."""

from collections.abc import Callable, Sequence

from dinfer.engine.engine import Engine
from dinfer.engine.faults import OnStrike, Strike
from dinfer.engine.hosting.commands import Command, Message, Table, stand_fields
from dinfer.plan.faults import Fault


def fault_commands(
    engine: Callable[[], Engine], report: Callable[..., None], tell_edits: Callable[[list[str]], None]
) -> Table:
    """`faults`: all that are to strike from now on; `stand`: where the rank stands, without stopping it."""

    def tell(strike: Strike) -> None:
        report("note", note="fault", **strike._asdict())

    def take(message: Message) -> Message:
        tell_edits(arm(engine(), [Fault.of(one) for one in message["faults"]], tell))
        return {}

    def stand(_: Message) -> Message:
        return stand_fields(engine().executor.stand())

    return {"faults": Command(take, slow=True), "stand": Command(stand)}


def arm(engine: Engine, faults: Sequence[Fault], tell: OnStrike) -> list[str]:
    """Have these faults, and no others, strike on this rank, which stands; what was edited by hand before."""
    prompt, armed = engine.prompt, engine.prompt.state.faults
    edited, room = prompt.look(), armed.room
    armed.arm(faults, tell)
    engine.make_room(prompt.state.cache.capacity + armed.room - room)
    armed.strike_what_is_here(prompt.executor.holds_block)
    prompt.edits.note_all()
    return edited

"""Arming: a session's word to a rank about the faults that are to strike there."""

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dinfer.engine.engine import Engine
from dinfer.engine.faults import OnStrike, Strike
from dinfer.engine.ops import HANDLERS, Outcome, header_at
from dinfer.engine.prefill import Prefill
from dinfer.messages import Message
from dinfer.plan.faults import Fault
from dinfer.plan.graph import channel_of
from dinfer.plan.ops import Op, parse_op
from dinfer.rank.commands import Command, CommandTable, stand_fields
from dinfer.transport.faulty import CutLink, SendsElsewhere, SendsLonger, SendsTwice, SlowReceiver
from dinfer.transport.gloo import Comm


def fault_commands(
    engine: Callable[[], Engine], report: Callable[..., None], tell_edits: Callable[[list[str]], None]
) -> CommandTable:
    """`faults`: all that are to strike from now on; `stand`: where the rank stands, without stopping it."""

    def tell(strike: Strike) -> None:
        report("note", note="fault", **strike._asdict())

    def take(message: Message) -> Message:
        tell_edits(set_faults(engine(), [Fault.of(one) for one in message["faults"]], tell))
        return {}

    def stand(_: Message) -> Message:
        return stand_fields(engine().executor.stand())

    return {"faults": Command(take, slow=True), "stand": Command(stand)}


def set_faults(engine: Engine, faults: Sequence[Fault], tell: OnStrike) -> list[str]:
    """Have these faults, and no others, strike on this rank, which stands; what was edited by hand before."""
    prompt, armed = engine.prompt, engine.prompt.state.faults
    edited, room = prompt.new_edits(), armed.extra_rows
    armed.arm(faults, tell)
    engine.grow_cache(prompt.state.cache.capacity + armed.extra_rows - room)
    armed.strike_existing(prompt.executor.holds_block)
    prompt.edits.accept_all()
    return edited


FOREVER_S = 3600

APART_S, POSTED_S = 10.0, 0.05
"""how long to wait for another lane to come to its op, and for what it sends to be on its way"""

Handler = Callable[[Prefill, Op, Comm], Outcome]

Act = Callable[[Handler, Prefill, Op, Comm, Message], Outcome]

_WHOLE = dict(HANDLERS)


class Mischief(RuntimeError):
    """What an op raises where it is told to raise something."""


def misbehave_commands(rank: int, report: Callable[..., None]) -> CommandTable:
    """`misbehave`: one act, from now on; `behave`: none any more. The first strike is reported, with its time."""

    def take(message: Message) -> Message:
        arm(rank, message, lambda op: report("struck", op=str(op), at=time.monotonic()))
        return {}

    def behave(_: Message) -> Message:
        disarm()
        return {}

    return {"misbehave": Command(take), "behave": Command(behave)}


def arm(rank: int, order: Message, struck: Callable[[Op], None]) -> None:
    """Have this rank do `order["act"]` at the ops that it is about: those in `ops`, texts, or all of kind `of`, of that
    peer where one is named. What more an act needs is in the order too."""
    act = ACTS[order["act"]]
    kind = order.get("of") or order["ops"][0].split()[0]
    behind, begun = HANDLERS[kind], threading.Event()
    order = {**order, "begun": begun}

    def handler(state: Prefill, op: Op, comm: Comm) -> Outcome:
        if state.rank != rank or not _is_meant(order, op):
            return behind(state, op, comm)
        if not begun.is_set() and ("of" in order or str(op) == order["ops"][0]):
            begun.set()
            struck(op)
        return act(behind, state, op, comm, order)

    HANDLERS[kind] = handler


def disarm() -> None:
    """Of all ranks of this process."""
    HANDLERS.update(_WHOLE)


def _is_meant(order: Message, op: Op) -> bool:
    if "of" in order:
        return order.get("peer") in (None, op.peer)
    return str(op) in order["ops"]


# -- messages


def _skip(*_: Any) -> Outcome:
    """As if it were done."""
    return Outcome()


def _reorder(_: Handler, state: Prefill, op: Op, comm: Comm, order: Message) -> Outcome:
    """Of two sends each sends what is the other's, which need not have been computed."""
    first, second = map(parse_op, order["ops"])
    other = second if op == first else first
    payload = state.block(other.chunk, other.layer)
    met = comm.send(channel_of(comm.rank, op), header_at(state, other).pack(), payload)
    return Outcome(met, payload.nbytes)


def _with(
    wire: Callable[..., Comm], handler: Handler, state: Prefill, op: Op, comm: Comm, order: Message
) -> Outcome:
    """The op itself, over a transport that is broken."""
    return handler(state, op, wire(comm, *order.get("with", ())))


def _elsewhere(handler: Handler, state: Prefill, op: Op, comm: Comm, order: Message) -> Outcome:
    """The first op's message goes to another rank; the second op, which is to send that rank the same, comes after it:
    header and payload of two messages on one channel must not mix, which would end who receives them."""
    if str(op) == order["ops"][0]:
        return handler(state, op, SendsElsewhere(comm, *order["with"]))
    order["begun"].wait(APART_S)
    time.sleep(POSTED_S)
    return handler(state, op, comm)


def _another_plan(handler: Handler, state: Prefill, op: Op, comm: Comm, _: Message) -> Outcome:
    """From here on this rank's messages say, and expect, that they are of another plan."""
    state.plan = replace(state.plan, schedule="another")
    return handler(state, op, comm)


def _command(handler: Handler, state: Prefill, op: Op, comm: Comm, order: Message) -> Outcome:
    """The op, after a command that does something to this host's network."""
    subprocess.run(
        order["command"], stdin=subprocess.DEVNULL, capture_output=True, timeout=APART_S, check=True
    )
    return handler(state, op, comm)


# -- ops


def _raise(_handler: Handler, _state: Prefill, op: Op, *_: Any) -> Outcome:
    raise Mischief(f"made by the lab at `{op}`")


def _pace(handler: Handler, state: Prefill, op: Op, comm: Comm, order: Message) -> Outcome:
    """The op, and so many seconds more; `spin`: with CPU time that moves."""
    outcome = handler(state, op, comm)
    if order.get("spin"):
        end = time.monotonic() + order["seconds"]
        while time.monotonic() < end:
            pass
    else:
        time.sleep(order["seconds"])
    return outcome


def _stall(*_: Any) -> Outcome:
    time.sleep(FOREVER_S)
    return Outcome()


def _stall_in_c(*_: Any) -> Outcome:
    ctypes.CDLL(None).usleep(3_600_000_000)
    return Outcome()


def _stall_with_gil(*_: Any) -> Outcome:
    ctypes.PyDLL(None).usleep(3_600_000_000)
    return Outcome()


# -- processes


def _signal(_handler: Handler, _state: Prefill, _op: Op, _comm: Comm, order: Message) -> Outcome:
    os.kill(os.getpid(), getattr(signal, order["signal"]))
    time.sleep(
        FOREVER_S
    )  # it may take effect a little after kill has returned; the op must not go on meanwhile
    return Outcome()


ACTS: dict[str, Act] = {
    "skip": _skip,
    "reorder": _reorder,
    "longer": partial(_with, SendsLonger),
    "twice": partial(_with, SendsTwice),
    "elsewhere": _elsewhere,
    "another plan": _another_plan,
    "raise": _raise,
    "pace": _pace,
    "stall": _stall,
    "stall in C": _stall_in_c,
    "stall with GIL": _stall_with_gil,
    "signal": _signal,
    "slow wire": partial(_with, SlowReceiver),
    "cut": partial(_with, CutLink),
    "command": _command,
}

"""How a session breaks a rank: faults in its KV, for `run.inject`, and misbehaviour, for the fault lab.

Misbehaviour is of communication and of processes. While it is set, it stands in front of the functions that carry out
ops, which are one table for all ranks of a process; afterwards nothing of it is left.
"""

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import Tensor

from dinfer.engine.engine import Engine
from dinfer.engine.faults import OnStrike, Strike
from dinfer.engine.ops import HANDLERS, Outcome, header_at
from dinfer.engine.prefill import Prefill
from dinfer.messages import Behave, Edited, FaultStruck, Misbehave, RankReport, SetFaults, Struck
from dinfer.plan.faults import Fault
from dinfer.plan.graph import Channel, channel_of
from dinfer.plan.ops import Op, parse_op
from dinfer.rank.commands import Handler, quick, slow
from dinfer.transport.gloo import Comm
from dinfer.transport.header import Header

SendReport = Callable[[RankReport], None]


def fault_commands(engine: Callable[[], Engine], report: SendReport) -> list[Handler]:
    def strike(found: Strike) -> None:
        report(FaultStruck(found.number, found.changed, found.found))

    def take(command: SetFaults) -> None:
        if edited := set_faults(engine(), [Fault.of(one) for one in command.faults], strike):
            report(Edited(tuple(edited)))

    return [slow(SetFaults, take)]


def set_faults(engine: Engine, faults: Sequence[Fault], on_strike: OnStrike) -> list[str]:
    """Have these faults, and no others, strike on this rank, which must stand; what its user had edited before."""
    prompt, armed = engine.prompt, engine.prompt.state.faults
    edited, room = prompt.new_edits(), armed.extra_rows
    armed.arm(faults, on_strike)
    engine.grow_cache(prompt.state.cache.capacity + armed.extra_rows - room)
    armed.strike_existing(prompt.executor.holds_block)
    prompt.edits.accept_all()
    return edited


FOREVER_S = 3600

APART_S, POSTED_S = 10.0, 0.05
"""how long to wait for another lane to come to its op, and for what it sends to be on its way"""

RunOp = Callable[[Prefill, Op, Comm], Outcome]


class Order(msgspec.Struct, frozen=True):
    """What a session has ordered. `begun`: set once it has struck."""

    to: Misbehave
    begun: threading.Event


Act = Callable[[RunOp, Prefill, Op, Comm, Order], Outcome]
"""what a rank does instead of an op, given the function that carries that out"""

_WHOLE = dict(HANDLERS)


class Mischief(RuntimeError):
    """What an op raises where it is told to raise something."""


def misbehave_commands(rank: int, report: SendReport) -> list[Handler]:
    """The first strike of each order is reported, with its time."""

    def take(command: Misbehave) -> None:
        arm(rank, command, lambda op: report(Struck(str(op), time.monotonic())))

    return [quick(Misbehave, take), quick(Behave, lambda _: disarm())]


def arm(rank: int, command: Misbehave, struck: Callable[[Op], None]) -> None:
    """Have this rank misbehave; `struck` is called when it does so first. Raises KeyError for an unknown act."""
    act = ACTS[command.act]
    kind = command.of or command.ops[0].split()[0]
    behind, order = HANDLERS[kind], Order(command, threading.Event())

    def handler(state: Prefill, op: Op, comm: Comm) -> Outcome:
        is_meant = command.peer in (None, op.peer) if command.of else str(op) in command.ops
        if state.rank != rank or not is_meant:
            return behind(state, op, comm)
        if not order.begun.is_set() and (command.of or str(op) == command.ops[0]):
            order.begun.set()
            struck(op)
        return act(behind, state, op, comm, order)

    HANDLERS[kind] = handler


def disarm() -> None:
    """Let all ranks of this process behave again."""
    HANDLERS.update(_WHOLE)


# -- messages


def _skip(*_: Any) -> Outcome:
    """As if it were done."""
    return Outcome()


def _reorder(_: RunOp, state: Prefill, op: Op, comm: Comm, order: Order) -> Outcome:
    """Of two sends each sends what is the other's, which need not have been computed."""
    first, second = map(parse_op, order.to.ops)
    other = second if op == first else first
    payload = state.block(other.chunk, other.layer)
    met = comm.send(channel_of(comm.rank, op), header_at(state, other).pack(), payload)
    return Outcome(met, payload.nbytes)


def _broken(comm: Comm, **methods: Callable[..., object]) -> Comm:
    """This transport with these methods in place of its own."""
    changed = copy(comm)
    vars(changed).update(methods)
    return changed


def _twice(handler: RunOp, state: Prefill, op: Op, comm: Comm, _: Order) -> Outcome:
    """Its message is sent twice."""

    def send(channel: Channel, header: bytes, payload: Tensor | None) -> int:
        met = comm.send(channel, header, payload)
        comm.send(channel, header, payload)
        return met

    return handler(state, op, _broken(comm, send=send))


def _longer(handler: RunOp, state: Prefill, op: Op, comm: Comm, _: Order) -> Outcome:
    """Its message has one token more than its payload."""

    def send(channel: Channel, header: bytes, _: Tensor | None) -> int:
        true = Header.unpack(header)
        tokens, longer = true.tokens + 1, true.nbytes // true.tokens * (true.tokens + 1)
        changed = replace(true, tokens=tokens, nbytes=longer)
        return comm.send(channel, changed.pack(), torch.zeros(longer, dtype=torch.uint8))

    return handler(state, op, _broken(comm, send=send))


def _elsewhere(handler: RunOp, state: Prefill, op: Op, comm: Comm, order: Order) -> Outcome:
    """The first op's message goes to another rank; the second op, which is to send that rank the same, comes after it:
    header and payload of two messages on one channel must not mix, which would end who receives them."""

    def send(channel: Channel, header: bytes, payload: Tensor | None) -> int:
        return comm.send(channel._replace(target=int(order.to.wire[0])), header, payload)

    if str(op) == order.to.ops[0]:
        return handler(state, op, _broken(comm, send=send))
    order.begun.wait(APART_S)
    time.sleep(POSTED_S)
    return handler(state, op, comm)


def _slow_wire(handler: RunOp, state: Prefill, op: Op, comm: Comm, order: Order) -> Outcome:
    """Its payload arrives late."""

    def recv_payload(channel: Channel, out: Tensor) -> None:
        time.sleep(order.to.wire[0])
        comm.recv_payload(channel, out)

    return handler(state, op, _broken(comm, recv_payload=recv_payload))


def _cut(handler: RunOp, state: Prefill, op: Op, comm: Comm, _: Order) -> Outcome:
    """It receives nothing, without an error: it waits for a gather that no other rank joins."""
    comm.all_gather(b"cut")
    return handler(state, op, comm)


def _another_plan(handler: RunOp, state: Prefill, op: Op, comm: Comm, _: Order) -> Outcome:
    """From here on this rank's messages say, and expect, that they are of another plan."""
    state.plan = replace(state.plan, schedule="another")
    return handler(state, op, comm)


def _command(handler: RunOp, state: Prefill, op: Op, comm: Comm, order: Order) -> Outcome:
    """The op, after a command that does something to this host's network."""
    command = order.to.command
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=APART_S, check=True)
    return handler(state, op, comm)


# -- ops


def _raise(_handler: RunOp, _state: Prefill, op: Op, *_: Any) -> Outcome:
    raise Mischief(f"made by the lab at `{op}`")


def _pace(handler: RunOp, state: Prefill, op: Op, comm: Comm, order: Order) -> Outcome:
    """The op, and so many seconds more; `spin`: with CPU time that moves."""
    outcome = handler(state, op, comm)
    if order.to.spin:
        end = time.monotonic() + order.to.seconds
        while time.monotonic() < end:
            pass
    else:
        time.sleep(order.to.seconds)
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


def _signal(_handler: RunOp, _state: Prefill, _op: Op, _comm: Comm, order: Order) -> Outcome:
    os.kill(os.getpid(), getattr(signal, order.to.signal))
    # It may take effect a little after kill has returned; the op must not go on meanwhile.
    return _stall()


ACTS: dict[str, Act] = {
    "skip": _skip,
    "reorder": _reorder,
    "longer": _longer,
    "twice": _twice,
    "elsewhere": _elsewhere,
    "another plan": _another_plan,
    "raise": _raise,
    "pace": _pace,
    "stall": _stall,
    "stall in C": _stall_in_c,
    "stall with GIL": _stall_with_gil,
    "signal": _signal,
    "slow wire": _slow_wire,
    "cut": _cut,
    "command": _command,
}

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
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from dinfer.engine.engine import Engine
from dinfer.engine.faults import OnStrike, Strike
from dinfer.engine.ops import HANDLERS, Outcome, message_of
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
        if edited := set_faults(engine(), [Fault(**one) for one in command.faults], strike):
            report(Edited(tuple(edited)))

    return [slow(SetFaults, take)]


def set_faults(engine: Engine, faults: Sequence[Fault], on_strike: OnStrike) -> list[str]:
    """Have these faults, and no others, strike on this rank, which must stand; what its user had edited before."""
    prompt, armed = engine.prompt, engine.prompt.state.faults
    edited, room = prompt.new_edits(), armed.extra_rows
    prompt.state.coded.seal_all()  # what is sealed later would overwrite what strikes now
    armed.arm(faults, on_strike)
    engine.grow_cache(prompt.state.cache.capacity + armed.extra_rows - room)
    armed.strike_existing(prompt.executor.holds_block)
    prompt.edits.accept_all()
    return edited


FOREVER_S = 3600

APART_S = 10.0
"""how long to wait for another lane to come to its op"""

RunOp = Callable[[Prefill, Op, Comm], Outcome]

ACTS = frozenset(
    (
        "skip", "reorder", "longer", "twice", "elsewhere", "another plan", "slow wire", "cut", "command",
        "raise", "pace", "stall", "stall in C", "stall with GIL", "signal",
    )
)  # fmt: skip
"""all ways to misbehave at an op; `_misbehave` does them"""

_WHOLE = dict(HANDLERS)


class Mischief(RuntimeError):
    """What an op raises where it is told to raise something."""


def misbehave_commands(rank: int, report: SendReport) -> list[Handler]:
    """The first strike of each order is reported, with its time."""

    def take(command: Misbehave) -> None:
        arm(rank, command, lambda op: report(Struck(str(op), time.monotonic())))

    return [quick(Misbehave, take), quick(Behave, lambda _: disarm())]


def arm(rank: int, order: Misbehave, struck: Callable[[Op], None]) -> None:
    """Have this rank misbehave; `struck` is called when it does so first. Raises KeyError for an unknown act."""
    if order.act not in ACTS:
        raise KeyError(order.act)
    kind = order.of or order.ops[0].split()[0]
    run, begun, on_channel = HANDLERS[kind], threading.Event(), Lock()

    def handler(state: Prefill, op: Op, comm: Comm) -> Outcome:
        is_meant = order.peer in (None, op.peer) if order.of else str(op) in order.ops
        if state.rank != rank or not is_meant:
            return run(state, op, comm)
        is_first = bool(order.of) or str(op) == order.ops[0]
        if order.act == "elsewhere" and not is_first:
            # The second op is to send that rank the same, and comes after it: header and payload of two messages on
            # one channel must not mix, which would end who receives them.
            begun.wait(APART_S)
        with on_channel if order.act == "elsewhere" else nullcontext():
            if is_first and not begun.is_set():
                begun.set()
                struck(op)
            return _misbehave(order, run, state, op, comm)

    HANDLERS[kind] = handler


def disarm() -> None:
    """Let all ranks of this process behave again."""
    HANDLERS.update(_WHOLE)


def _misbehave(order: Misbehave, run: RunOp, state: Prefill, op: Op, comm: Comm) -> Outcome:
    """Misbehave at an op. `run` carries it out."""
    match order.act:
        # messages
        case "skip":  # as if it were done
            return Outcome()
        case "reorder":  # of two sends each sends what is the other's, which need not have been computed
            first, second = map(parse_op, order.ops)
            other = second if op == first else first
            payload, header = message_of(state, other)
            met = comm.send(channel_of(comm.rank, op), header, payload)
            return Outcome(met, payload.nbytes)
        case "longer":
            comm = _broken(comm, send=partial(_send_longer, comm))
        case "twice":
            comm = _broken(comm, send=partial(_send_twice, comm))
        case "elsewhere" if str(op) == order.ops[0]:
            comm = _broken(comm, send=partial(_send_to, comm, int(order.wire[0])))
        case (
            "another plan"
        ):  # this rank's messages say, and expect, from here on that they are of another plan
            state.plan = replace(state.plan, schedule="another")
        case "slow wire":
            comm = _broken(comm, recv_payload=partial(_recv_late, comm, order.wire[0]))
        case "cut":  # receive nothing, without an error: wait for a gather that no other rank joins
            comm.all_gather(b"cut")
        case "command":  # it does something to this host's network
            subprocess.run(
                order.command, stdin=subprocess.DEVNULL, capture_output=True, timeout=APART_S, check=True
            )
        # ops
        case "raise":
            raise Mischief(f"made by the lab at `{op}`")
        case "pace":
            outcome, end = run(state, op, comm), time.monotonic() + order.seconds
            while order.spin and time.monotonic() < end:
                pass
            time.sleep(max(0.0, end - time.monotonic()))
            return outcome
        case "stall":
            time.sleep(FOREVER_S)
            return Outcome()
        case "stall in C":
            ctypes.CDLL(None).usleep(3_600_000_000)
            return Outcome()  # a signal ends usleep early: the op stays undone all the same
        case "stall with GIL":
            ctypes.PyDLL(None).usleep(3_600_000_000)
            return Outcome()
        # processes
        case "signal":
            os.kill(os.getpid(), getattr(signal, order.signal))
            time.sleep(FOREVER_S)  # it may take effect a little later; the op must not go on meanwhile
            return Outcome()
    return run(state, op, comm)


def _broken(comm: Comm, **methods: Callable[..., object]) -> Comm:
    """This transport with these methods in place of its own."""
    changed = copy(comm)
    vars(changed).update(methods)
    return changed


def _send_longer(comm: Comm, channel: Channel, header: bytes, _: Tensor | None) -> int:
    """Send one token more than the payload has."""
    true = Header.unpack(header)
    tokens, longer = true.tokens + 1, true.nbytes // true.tokens * (true.tokens + 1)
    changed = replace(true, tokens=tokens, nbytes=longer)
    return comm.send(channel, changed.pack(), torch.zeros(longer, dtype=torch.uint8))


def _send_twice(comm: Comm, channel: Channel, header: bytes, payload: Tensor | None) -> int:
    met = comm.send(channel, header, payload)
    comm.send(channel, header, payload)
    return met


def _send_to(comm: Comm, target: int, channel: Channel, header: bytes, payload: Tensor | None) -> int:
    return comm.send(channel._replace(target=target), header, payload)


def _recv_late(comm: Comm, seconds: float, channel: Channel, out: Tensor) -> None:
    time.sleep(seconds)
    comm.recv_payload(channel, out)

"""Which execution a backend takes: lanes as threads, or, on NCCL, one lane issued to streams."""

from collections.abc import Callable

from dinfer.config import Backend
from dinfer.engine.board import Board
from dinfer.engine.execution import Execution
from dinfer.engine.executor import Executor
from dinfer.engine.gate import Gate
from dinfer.engine.handlers import Prefill
from dinfer.engine.issuer import Issuer
from dinfer.engine.transport.comm import Comm
from dinfer.engine.transport.streams import StreamComm
from dinfer.plan.lower import lower
from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder


def as_issued(plan: Plan, backend: Backend) -> Plan:
    """The plan as the backend can run it: on NCCL, lowered."""
    return lower(plan) if backend == "nccl" and not plan.is_lowered else plan


def execution(
    backend: Backend,
    plan: Plan,
    state: Prefill,
    comm: Comm,
    gate: Gate,
    recorder: Recorder,
    board: Board,
    on_op: Callable[[Event, Op], None],
) -> Execution:
    """What runs this rank's lanes; `on_op` is told of every op that has ended."""
    given = plan, state, comm, gate, recorder, board, on_op
    if backend != "nccl":
        return Executor(*given)
    assert isinstance(comm, StreamComm), "this transport takes no work to be run later"
    return Issuer(*given, streams=comm.open_streams(state.decoder.device))

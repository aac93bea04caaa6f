"""Lanes as threads: each lane is a thread that runs its ops one after another up to a limit.

An op starts when it is the next on its lane, the values it needs are on the rank, and the lane's limit allows it. To
step is to raise limits; to stop is to freeze them and to release recvs that were posted too early; to go back is to set
positions. `ops` has what an op does.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import monotonic_ns
from typing import NamedTuple

from dinfer.engine.board import Board, Stand
from dinfer.engine.lanes import LaneExecutor, LaneState
from dinfer.engine.ops import HANDLERS
from dinfer.engine.prefill import Prefill
from dinfer.plan.graph import Channel, channel_of
from dinfer.plan.ops import Op, PlanError
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import Comm
from dinfer.transport.header import VOID_HEADER


class _Task(NamedTuple):
    """What a lane does next: run an op, or send a void header on a channel. Neither: the thread ends."""

    op: Op | None = None
    void: Channel | None = None


_STOP = _Task()


class ThreadExecutor(LaneExecutor):
    """Runs each lane on a thread; a transfer blocks its lane. Raises PlanError if two lanes share a channel."""

    def __init__(
        self,
        state: Prefill,
        comm: Comm,
        gate: Gate,
        recorder: Recorder,
        board: Board | None = None,
        on_op: Callable[[Event, Op], None] | None = None,
    ) -> None:
        super().__init__(state, comm, gate, recorder, board, on_op)
        self._senders = _senders(self.rank, self._lanes)
        for lane in self._lanes:
            self._add_thread(lane.name, partial(self._run, lane))

    def freeze(self) -> Stand:
        with self.gate.change():
            for lane in self._lanes:
                lane.limit = lane.position + lane.started
                self._publish(lane)
            return self.stand()

    def release(self, channels: Iterable[Channel]) -> None:
        with self.gate.change():
            for channel in channels:
                self._senders[channel].release.append(channel)

    # -- on the lanes' threads

    def _run(self, lane: LaneState) -> None:
        try:
            while (task := self.gate.wait(lambda: self._claim(lane))) and task != _STOP:
                if task.void is not None:
                    self.comm.send(task.void, VOID_HEADER, None)
                elif task.op is not None:
                    self._do(lane, task.op)
        except BaseException as error:  # an op may raise anything, SystemExit too: report it
            self._fail(lane, lane.ops[min(lane.position, len(lane.ops) - 1)], error)
        finally:
            self.gate.leave()

    def _claim(self, lane: LaneState) -> _Task | None:
        """The lane's next task, or None if it cannot start yet. Called under the gate's lock."""
        if self._is_over:
            return _STOP
        if lane.release:
            return _Task(void=lane.release.pop(0))
        if lane.position >= min(lane.limit, len(lane.ops)):
            lane.allowed_at = 0
            return None
        lane.allowed_at = lane.allowed_at or monotonic_ns()
        op = lane.ops[lane.position]
        if not self._made.issuperset(op.needs()):
            return None
        lane.started, lane.started_at = True, monotonic_ns()
        self._publish(lane)
        return _Task(op)

    def _do(self, lane: LaneState, op: Op) -> None:
        self._check_new(op)
        outcome = HANDLERS[op.kind](self.state, op, self.comm)
        end = monotonic_ns()
        if not outcome.released:
            times = lane.allowed_at, lane.started_at, outcome.met or lane.started_at, end
            self._record(lane, op, times, outcome.bytes, lane.position, outcome.corrupt)
        with self.gate.change():
            if not outcome.released:
                self._check_new(op)  # again: another lane may have made it while this one waited
                self._made.update(op.makes())
                lane.position += 1
            lane.started, lane.allowed_at = False, 0
            self._publish(lane)


def _senders(rank: int, lanes: Sequence[LaneState]) -> dict[Channel, LaneState]:
    """The lane that sends on each channel. Raises PlanError if a channel has two lanes at this rank."""
    owner: dict[Channel, LaneState] = {}
    for lane in lanes:
        for op in lane.ops:
            if op.is_transfer and owner.setdefault(channel_of(rank, op), lane) is not lane:
                other = owner[channel_of(rank, op)]
                raise PlanError(
                    f"lanes {other.name} and {lane.name} of rank {rank} both use the channel of `{op}`."
                )
    return {channel: lane for channel, lane in owner.items() if channel.source == rank}

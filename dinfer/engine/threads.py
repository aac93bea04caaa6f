"""Lanes as threads: each lane is a thread that runs its ops one after another up to a limit.

An op starts when it is the next on its lane, the values it needs are on the rank, and the lane's limit allows it. To
step is to raise limits; to stop is to freeze them and to release recvs that were posted too early.
"""

from collections.abc import Iterable
from functools import partial
from time import monotonic_ns
from typing import Literal

from dinfer.engine.board import Stand
from dinfer.engine.lanes import Execution, LaneExecutor, LaneState
from dinfer.engine.ops import HANDLERS
from dinfer.plan.graph import Channel, channel_of
from dinfer.plan.ops import Op, PlanError
from dinfer.trace.events import event_of
from dinfer.transport.header import VOID_HEADER


class ThreadExecutor(LaneExecutor):
    """Runs each lane on a thread; a transfer blocks its lane. Raises PlanError if two lanes share a channel."""

    def __init__(self, given: Execution) -> None:
        super().__init__(given)
        self._lane_of: dict[Channel, LaneState] = {}
        for lane in self._lanes:
            for op in lane.ops:
                if not op.is_transfer:
                    continue
                owner = self._lane_of.setdefault(channel_of(self.rank, op), lane)
                if owner is not lane:
                    raise PlanError(
                        f"lanes {owner.name} and {lane.name} of rank {self.rank} both use the channel of `{op}`."
                    )
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
                self._lane_of[channel].release.append(channel)

    def _run(self, lane: LaneState) -> None:
        try:
            while isinstance(task := self.gate.wait(lambda: self._claim(lane)), (Op, Channel)):
                if isinstance(task, Channel):
                    self.comm.send(task, VOID_HEADER, None)
                else:
                    self._do(lane, task)
        except BaseException as error:  # an op may raise anything, SystemExit too: report it
            self._fail(lane, lane.ops[min(lane.position, len(lane.ops) - 1)], error)
        finally:
            self.gate.leave()

    def _claim(self, lane: LaneState) -> Op | Channel | Literal[False] | None:
        """What the lane does next: run an op, or send a void header on a channel. None: it cannot start that yet;
        False: its thread ends. Called under the gate's lock."""
        if self._is_over:
            return False
        if lane.release:
            return lane.release.pop(0)
        if not lane.may_run:
            lane.allowed_at = 0
            return None
        lane.allowed_at = lane.allowed_at or monotonic_ns()
        op, made = lane.ops[lane.position], self._made
        for need in lane.needs[lane.position]:
            if need not in made:
                return None
        lane.started, lane.started_at = True, monotonic_ns()
        self._publish(lane)
        return op

    def _do(self, lane: LaneState, op: Op) -> None:
        self._check_new(op)
        outcome = HANDLERS[op.kind](self.state, op, self.comm)
        end = monotonic_ns()
        if not outcome.released:
            times = lane.allowed_at, lane.started_at, outcome.met or lane.started_at, end
            event = event_of(op, self.rank, lane.name, lane.position, times, outcome.bytes)
            self._record(lane, op, event, outcome.corrupt)
        with self.gate.change():
            if not outcome.released:
                self._check_new(op)  # again: another lane may have made it while this one waited
                self._made.update(op.makes())
                lane.position += 1
            lane.started, lane.allowed_at = False, 0
            self._publish(lane)

"""Execution: what every way to run one rank's part of a plan has in common, and what its users may ask of it.

Positions and limits of lanes, what has been made, events, failure. How ops are started is decided by those who
build on it: lanes as threads (executor), or one lane issued to streams (issuer).
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import NamedTuple

import torch

from dinfer.engine.board import MAX_LANES, Board, Stand
from dinfer.engine.corruption import Corruption
from dinfer.engine.prefill import Prefill
from dinfer.plan.graph import Channel
from dinfer.plan.ops import Op, PlanError, Value
from dinfer.plan.plan import Plan
from dinfer.trace.events import Event
from dinfer.trace.of_plan import event_of
from dinfer.trace.recorder import Recorder
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import Comm


class OpFailed(RuntimeError):
    """An op raised. The message names rank, op, layer and chunk; the original error is the cause."""

    def __init__(self, rank: int, lane: str, op: Op, error: BaseException) -> None:
        at = f"rank {rank} failed at `{op}` (lane {lane})"
        super().__init__(f"{at}: {type(error).__name__}: {error}")
        self.rank, self.lane, self.op, self.error = rank, lane, op, error


@dataclass
class LaneState:
    """Where a lane stands. `started`: its next op has begun."""

    number: int
    name: str
    ops: Sequence[Op]
    position: int = 0
    limit: int = 0
    started: bool = False
    allowed_at: int = 0
    started_at: int = 0
    release: list[Channel] = field(default_factory=list)


class Execution(NamedTuple):
    """What an executor works on. `on_op(event, op)` is called for every op that has ended, on a thread of this rank."""

    plan: Plan
    state: Prefill
    comm: Comm
    gate: Gate
    recorder: Recorder
    board: Board
    on_op: Callable[[Event, Op], None]


class LaneExecutor(ABC):
    """Runs one rank's part of a plan. All limits begin at 0; `set_limits` lets lanes go."""

    def __init__(self, given: Execution) -> None:
        self.plan, self.state, self.comm, self.gate, self.recorder, self.board, self.on_op = given
        self.rank = self.comm.rank
        self.failure: OpFailed | None = None
        self._closing = False
        self._made: set[Value] = set()
        self._lanes = [LaneState(n, lane.name, lane.ops) for n, lane in enumerate(self.plan.lanes[self.rank])]
        if len(self._lanes) > MAX_LANES:
            raise PlanError(
                f"rank {self.rank} has {len(self._lanes)} lanes; at most {MAX_LANES} can be shown."
            )
        self._threads: list[threading.Thread] = []
        for lane in self._lanes:
            self._publish(lane)

    # -- control

    def start(self) -> None:
        """Start the threads; lanes wait at limit 0."""
        for thread in self._threads:
            thread.start()

    def set_limits(self, limits: Sequence[int]) -> None:
        """Let each lane go up to, and not past, that many ops."""
        with self.gate.change():
            for lane, limit in zip(self._lanes, limits, strict=True):
                lane.limit = limit
                self._publish(lane)

    @abstractmethod
    def freeze(self) -> Stand:
        """Start no further op; where the lanes stand at that moment."""

    @abstractmethod
    def release(self, channels: Iterable[Channel]) -> None:
        """Have the lanes that send on these channels release, by a void header, a recv posted there."""

    def rewind(self, positions: Sequence[int]) -> None:
        """Go back to positions that all lanes have passed. All lanes must stand at their limits.

        Raises RuntimeError if they do not.
        """
        with self.gate.change():
            stand = self.stand()
            if (
                not stand.at_limits
                or any(stand.started)
                or any(a > b for a, b in zip(positions, stand.positions, strict=True))
            ):
                raise RuntimeError(
                    f"rank {self.rank} cannot go back to {list(positions)}: it stands at {stand}."
                )
            for lane, position in zip(self._lanes, positions, strict=True):
                lane.position = lane.limit = position
                self._publish(lane)
            done = [op for lane in self._lanes for op in lane.ops[: lane.position]]
            self._made = {value for op in done for value in op.makes()}
            self.state.rewind(done, [op for lane in self._lanes for op in lane.ops[lane.position :]])

    def stand(self) -> Stand:
        lanes = self._lanes
        return Stand(
            tuple(lane.position for lane in lanes),
            tuple(lane.started for lane in lanes),
            tuple(lane.limit for lane in lanes),
        )

    def wait(self, until: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until `until()` holds or this rank has failed; whether it holds. Raises OpFailed."""
        held = self.gate.wait(lambda: (until() or self.failure is not None) or None, timeout)
        if self.failure is not None:
            raise self.failure
        return bool(held)

    def run_to_end(self, timeout: float | None = None) -> bool:
        """Let all lanes go to their end and wait for it. Raises OpFailed."""
        self.set_limits([len(lane.ops) for lane in self._lanes])
        return self.wait(self.is_done, timeout)

    def is_done(self) -> bool:
        return all(lane.position == len(lane.ops) for lane in self._lanes)

    def holds(self, value: Value) -> bool:
        """Whether that value has been made on this rank."""
        return value in self._made

    def holds_block(self, chunk: int, layer: int) -> bool:
        return self.holds(Value("kv", chunk, layer))

    def outlast(self) -> None:
        """Wait until the threads are told to end. Raises OpFailed as soon as an op has failed."""
        self.wait(lambda: self._closing)

    def close(self, timeout: float = 5.0) -> bool:
        """End the threads; whether all ended within `timeout` seconds.

        One that is blocked in the transport ends only with the transport.
        """
        with self.gate.change():
            self._closing = True
        deadline = monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # -- for those who build on it

    def _thread(self, name: str, run: Callable[[], None]) -> None:
        """One more thread of this rank, enrolled at the gate, to be started by `start`."""

        def settled() -> None:
            # Each thread has its own count and takes over torch's only when torch needs it: a matrix product that comes
            # before that would run on all cores, with other last bits than on the threads that were asked for.
            torch.get_num_threads()
            run()

        thread = threading.Thread(target=settled, name=f"rank {self.rank} {name}", daemon=True)
        self._threads.append(thread)
        self.gate.enroll(thread.name)

    @property
    def _is_over(self) -> bool:
        return self._closing or self.failure is not None

    def _fail(self, lane: LaneState, op: Op, error: BaseException) -> None:
        with self.gate.change():
            failed = OpFailed(self.rank, lane.name, op, error)
            failed.__cause__ = error
            self.failure = self.failure or failed

    def _ended(self, lane: LaneState, op: Op, event: Event, corrupt: Corruption | None = None) -> None:
        """Raises Corrupted where the run is to fail by what was found."""
        self.recorder.record(lane.number, event)
        if corrupt:
            at = event.end
            found = replace(event, kind="corrupt", ready=at, start=at, met=at, index=None)
            self.recorder.record(lane.number, found)
            self.state.alarm(corrupt)
        self.on_op(event, op)

    def _check_new(self, op: Op) -> None:
        if twice := self._made.intersection(op.makes()):
            raise PlanError(f"{twice.pop()} is already on this rank; nothing may make it a second time.")

    def _event(
        self, lane: LaneState, op: Op, times: tuple[int, int, int, int], size: int, index: int
    ) -> Event:
        """`times`: ready, start, met and end, as in Event; `index`: the op's place on the lane."""
        return event_of(op, self.rank, lane.name, index, times, size)

    def _publish(self, lane: LaneState) -> None:
        self.board.set_lane(lane.number, lane.position, lane.limit, started=lane.started)

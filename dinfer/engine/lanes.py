"""The base class of what runs one rank's lanes: positions and limits, values made, events, failure.

The subclasses decide how ops start: `threads` runs each lane on its own thread, `streams` issues one lane to streams.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import NamedTuple

import torch

from dinfer.engine import full_collections
from dinfer.engine.board import MAX_LANES, Board, Stand
from dinfer.engine.corruption import Corruption
from dinfer.engine.prefill import Prefill
from dinfer.plan.graph import Channel
from dinfer.plan.ops import Op, PlanError, Value, new_needs
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import Comm


class OpFailed(RuntimeError):
    """An op raised. The message names rank, op, layer and chunk; the original error is `__cause__`."""

    def __init__(self, rank: int, lane: str, op: Op, error: BaseException) -> None:
        super().__init__(f"rank {rank} failed at `{op}` (lane {lane}): {type(error).__name__}: {error}")
        self.rank, self.lane, self.op, self.error = rank, lane, op, error


@dataclass
class LaneState:
    """A lane's ops and progress.

    `position`: ops that have ended; `limit`: ops that may run; `started`: whether the op at `position` has begun.
    `allowed_at` and `started_at` are monotonic ns. `release`: channels on which the lane is to send a void header.
    `needs`: by op, the values to wait for; those for which an earlier op of the lane has waited are there.
    """

    number: int
    name: str
    ops: Sequence[Op]
    position: int = 0
    limit: int = 0
    started: bool = False
    allowed_at: int = 0
    started_at: int = 0
    release: list[Channel] = field(default_factory=list)
    needs: Sequence[Sequence[Value]] = ()

    @property
    def may_run(self) -> bool:
        """Whether its limit allows an op that has not ended."""
        return self.position < self.limit and self.position < len(self.ops)


class Execution(NamedTuple):
    """What an executor works with. `on_op(event, op)` is called for each op that has ended, on some thread."""

    state: Prefill
    comm: Comm
    gate: Gate
    recorder: Recorder
    board: Board
    on_op: Callable[[Event, Op], None]
    watched: Callable[[Op], bool] = lambda _: False
    """whether a condition may hold at the op: no later one may start before `on_op` has seen it"""


class LaneExecutor(ABC):
    """Runs one rank's part of a plan. All limits start at 0; `set_limits` lets the lanes run.

    Raises PlanError if the plan gives the rank more lanes than a board can show.
    """

    def __init__(self, given: Execution) -> None:
        self.state, self.comm, self.gate, self.recorder, self.board, self.on_op, self.watched = given
        self.plan = self.state.plan
        self.rank = self.comm.rank
        self.failure: OpFailed | None = None
        self._closing = self._runs = False
        self._made: set[Value] = set()
        self._lanes = [
            LaneState(n, lane.name, lane.ops, needs=new_needs(lane.ops))
            for n, lane in enumerate(self.plan.lanes[self.rank])
        ]
        if len(self._lanes) > MAX_LANES:
            raise PlanError(
                f"rank {self.rank} has {len(self._lanes)} lanes; a plan may have at most {MAX_LANES} a rank."
            )
        self._threads: list[threading.Thread] = []
        for lane in self._lanes:
            self._publish(lane)

    def start(self) -> None:
        """Start the threads. Lanes wait at limit 0."""
        for thread in self._threads:
            thread.start()

    def set_limits(self, limits: Sequence[int]) -> None:
        """Let each lane run until that many of its ops have ended."""
        with self.gate.change():
            for lane, limit in zip(self._lanes, limits, strict=True):
                lane.limit = limit
                self._publish(lane)

    @abstractmethod
    def freeze(self) -> Stand:
        """Start no further op. Returns the lanes' positions at that moment."""

    @abstractmethod
    def release(self, channels: Iterable[Channel]) -> None:
        """Have the lanes that send on these channels send a void header, which releases a recv posted too early."""

    def rewind(self, positions: Sequence[int]) -> None:
        """Go back to these positions, one a lane. Raises RuntimeError unless all stand at their limits, past them."""
        with self.gate.change():
            stand = self.stand()
            is_back = all(a <= b for a, b in zip(positions, stand.positions, strict=True))
            if not (stand.at_limits and is_back) or any(stand.started):
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
        """Where the lanes stand now."""
        lanes = self._lanes
        return Stand(
            tuple(lane.position for lane in lanes),
            tuple(lane.started for lane in lanes),
            tuple(lane.limit for lane in lanes),
        )

    def wait(self, until: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds for `until()`; whether it holds. Raises OpFailed if an op has failed."""
        held = self.gate.wait(lambda: (until() or self.failure is not None) or None, timeout)
        if self.failure is not None:
            raise self.failure
        return bool(held)

    def run_to_end(self, timeout: float | None = None) -> bool:
        """Let all lanes run to their end and wait at most `timeout` seconds. Returns `is_done()`; raises OpFailed."""
        self.set_limits([len(lane.ops) for lane in self._lanes])
        return self.wait(self.is_done, timeout)

    def is_done(self) -> bool:
        """Whether every op of this rank has ended."""
        return all(lane.position == len(lane.ops) for lane in self._lanes)

    def holds_block(self, chunk: int, layer: int) -> bool:
        """Whether this rank has computed or received the block."""
        return self.holds(Value("kv", chunk, layer))

    def holds(self, value: Value) -> bool:
        """Whether this rank has computed or received the value."""
        return value in self._made

    @property
    def is_closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    def wait_until_closed(self) -> None:
        """Wait until `close` is called. Raises OpFailed as soon as an op has failed."""
        self.wait(lambda: self._closing)

    def close(self, timeout: float = 5.0) -> bool:
        """End the threads. Returns whether all ended within `timeout` seconds.

        A thread that is blocked in the transport ends only when the transport is closed.
        """
        with self.gate.change():
            self._closing = True
            for lane in self._lanes:
                self._publish(lane)
        deadline = monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # -- for subclasses

    def _add_thread(self, name: str, run: Callable[[], None]) -> None:
        """Add a thread, enrolled at the gate; `start` starts it."""

        def target() -> None:
            # A new thread adopts torch's thread count only when torch first asks for it. A matrix product before that
            # would run on all cores, and its last bits would differ.
            torch.get_num_threads()
            with torch.no_grad():
                run()

        thread = threading.Thread(target=target, name=f"rank {self.rank} {name}", daemon=True)
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
            self._publish(lane)

    def _record(self, lane: LaneState, op: Op, event: Event, corrupt: Corruption | None) -> None:
        """Record the event of an op that has ended, and call `on_op`. Raises Corrupted if `corrupt` is set and
        `on_corruption` is fail."""
        self.recorder.record(lane.number, event)
        if corrupt:
            at = event.end
            found = replace(event, kind="corrupt", ready=at, start=at, met=at, index=None)
            self.recorder.record(lane.number, found)
            self.state.alarm(corrupt)
        self.on_op(event, op)

    def _check_new(self, op: Op) -> None:
        """Raises PlanError if the op makes a value that is here already."""
        for value in op.makes():
            if value in self._made:
                raise PlanError(f"{value} is already on this rank; no op may make it a second time.")

    def _publish(self, lane: LaneState) -> None:
        self.board.set_lane(lane.number, lane.position, lane.limit, started=lane.started)
        runs = not self._is_over and (lane.may_run or any(one.may_run for one in self._lanes))
        if runs is not self._runs:
            self._runs = runs
            (full_collections.hold if runs else full_collections.release)(id(self))

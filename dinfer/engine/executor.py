"""Executor: one rank's lanes, each a thread that runs its ops one after another within a limit.

An op starts when it is first on its lane, what it needs is there, and the lane's limit allows it. Moving
limits is stepping; freezing them, and releasing what was received too early, is stopping; setting positions
is going back. What an op does is not decided here.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic, monotonic_ns
from typing import NamedTuple

from dinfer.engine.board import MAX_LANES, Board, Stand
from dinfer.engine.comm import Comm
from dinfer.engine.gate import Gate
from dinfer.engine.handlers import HANDLERS, Prefill, void_header
from dinfer.plan.graph import Channel, channel_of
from dinfer.plan.ops import Op, PlanError, Value
from dinfer.plan.plan import Plan
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder


class OpFailed(RuntimeError):
    """An op raised. The message names rank, op, layer and chunk; the original error is the cause."""

    def __init__(self, rank: int, lane: str, op: Op, error: BaseException) -> None:
        at = f"rank {rank} failed at `{op}` (lane {lane})"
        super().__init__(f"{at}: {type(error).__name__}: {error}")
        self.rank, self.lane, self.op, self.error = rank, lane, op, error


class _Task(NamedTuple):
    """What a lane does next: an op, or a void header on a channel; neither: there is nothing more to do."""

    op: Op | None = None
    void: Channel | None = None


_STOP = _Task()


@dataclass
class _Lane:
    number: int
    name: str
    ops: Sequence[Op]
    position: int = 0
    limit: int = 0
    started: bool = False
    allowed_at: int = 0
    started_at: int = 0
    release: list[Channel] = field(default_factory=list)


class Executor:
    """Runs one rank's part of a plan. All limits begin at 0; `set_limits` lets lanes go.

    `on_op(event, op)` is told of every op that has ended, on its lane's thread.
    """

    def __init__(
        self,
        plan: Plan,
        state: Prefill,
        comm: Comm,
        gate: Gate,
        recorder: Recorder,
        board: Board | None = None,
        on_op: Callable[[Event, Op], None] | None = None,
    ) -> None:
        self.plan, self.state, self.comm, self.gate = plan, state, comm, gate
        self.recorder, self.board, self.on_op = recorder, board or Board(), on_op
        self.rank = comm.rank
        self.failure: OpFailed | None = None
        self._closing = False
        self._made: set[Value] = set()
        self._lanes = [_Lane(n, lane.name, lane.ops) for n, lane in enumerate(plan.lanes[self.rank])]
        if len(self._lanes) > MAX_LANES:
            raise PlanError(
                f"rank {self.rank} has {len(self._lanes)} lanes; at most {MAX_LANES} can be shown."
            )
        self._senders = _senders(self.rank, self._lanes)
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=self._thread(lane), daemon=True)
            for lane in self._lanes
        ]
        for lane in self._lanes:
            self._publish(lane)
            gate.enroll(self._thread(lane))

    # -- control

    def start(self) -> None:
        """Start the lanes' threads; they wait at limit 0."""
        for thread in self._threads:
            thread.start()

    def set_limits(self, limits: Sequence[int]) -> None:
        """Let each lane go up to, and not past, that many ops."""
        with self.gate.change():
            for lane, limit in zip(self._lanes, limits, strict=True):
                lane.limit = limit
                self._publish(lane)

    def freeze(self) -> Stand:
        """Start no further op; where the lanes stand at that moment."""
        with self.gate.change():
            for lane in self._lanes:
                lane.limit = lane.position + lane.started
                self._publish(lane)
            return self.stand()

    def release(self, channels: Iterable[Channel]) -> None:
        """Have the lanes that send on these channels release, by a void header, a recv posted there."""
        with self.gate.change():
            for channel in channels:
                self._senders[channel].release.append(channel)

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

    def outlast(self) -> None:
        """Wait until the lanes are told to end. Raises OpFailed as soon as one has failed."""
        self.wait(lambda: self._closing)

    def holds_block(self, chunk: int, layer: int) -> bool:
        return self.holds(Value("kv", chunk, layer))

    def close(self, timeout: float = 5.0) -> bool:
        """End the lanes' threads; whether all ended within `timeout` seconds.

        A lane blocked in the transport ends only with the transport.
        """
        with self.gate.change():
            self._closing = True
        deadline = monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # -- the lanes' side

    def _run(self, lane: _Lane) -> None:
        try:
            while (task := self.gate.wait(lambda: self._claim(lane))) and task != _STOP:
                if task.void is not None:
                    self.comm.send(task.void, void_header(), None)
                elif task.op is not None:
                    self._do(lane, task.op)
        except BaseException as error:  # whatever an op raises, SystemExit too, is reported and never lost
            with self.gate.change():
                op = lane.ops[min(lane.position, len(lane.ops) - 1)]
                failed = OpFailed(self.rank, lane.name, op, error)
                failed.__cause__ = error
                self.failure = self.failure or failed
        finally:
            self.gate.leave()

    def _claim(self, lane: _Lane) -> _Task | None:
        """The lane's next task, if it can be begun now. Called under the gate's lock."""
        if self._closing or self.failure is not None:
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

    def _do(self, lane: _Lane, op: Op) -> None:
        self._check_new(op)
        outcome = HANDLERS[op.kind](self.state, op, self.comm)
        end = monotonic_ns()
        if not outcome.released:
            event = self._event(lane, op, outcome.met or lane.started_at, outcome.bytes, end)
            self.recorder.record(lane.number, event)
            if self.on_op:
                self.on_op(event, op)
        with self.gate.change():
            if not outcome.released:
                self._check_new(op)  # again: another lane may have made it while this one waited for its peer
                self._made.update(op.makes())
                lane.position += 1
            lane.started, lane.allowed_at = False, 0
            self._publish(lane)

    def _check_new(self, op: Op) -> None:
        if twice := self._made.intersection(op.makes()):
            raise PlanError(f"{twice.pop()} is already on this rank; nothing may make it a second time.")

    def _event(self, lane: _Lane, op: Op, met: int, size: int, end: int) -> Event:
        return Event(
            rank=self.rank,
            lane=lane.name,
            kind=op.kind,
            ready=lane.allowed_at,
            start=lane.started_at,
            met=met,
            end=end,
            what=op.what if op.is_transfer else "",
            chunk=None if op.chunk < 0 else op.chunk,
            layer=None if op.layer < 0 else op.layer,
            peer=op.peer if op.is_transfer else None,
            tokens=op.tokens,
            bytes=size,
            index=lane.position,
        )

    def _publish(self, lane: _Lane) -> None:
        self.board.set_lane(lane.number, lane.position, lane.limit, started=lane.started)

    def _thread(self, lane: _Lane) -> str:
        return f"rank {self.rank} {lane.name}"


def _senders(rank: int, lanes: Sequence[_Lane]) -> dict[Channel, _Lane]:
    """The lane that sends on each channel. Raises PlanError if a channel has two lanes at this rank."""
    owner: dict[Channel, _Lane] = {}
    for lane in lanes:
        for op in lane.ops:
            if op.is_transfer and owner.setdefault(channel_of(rank, op), lane) is not lane:
                other = owner[channel_of(rank, op)]
                raise PlanError(
                    f"lanes {other.name} and {lane.name} of rank {rank} both use the channel of `{op}`."
                )
    return {channel: lane for channel, lane in owner.items() if channel.source == rank}

"""A lowered plan on streams: one thread issues the rank's ops to streams and does not wait for them.

It issues up to the limit, and at most a window ahead of the ops that have ended, so that a pause is short. A second
thread waits for the ops in issue order, checks what arrived, records events and moves the position. An issued op cannot
be taken back, nor its recv released by a void header, so a stop counts every issued op as done.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import takewhile
from time import monotonic_ns
from typing import Literal, NamedTuple

from dinfer.engine.board import Stand
from dinfer.engine.lanes import Execution, LaneExecutor
from dinfer.engine.ops import HANDLERS, header_at, land, payload_of
from dinfer.plan.graph import Channel, channel_of
from dinfer.plan.ops import Op, PlanError, Value
from dinfer.trace.events import event_of
from dinfer.transport.header import Header, check
from dinfer.transport.streams import COMPUTE, ENTRY, Issued, Streams

WINDOW = 128
"""how many ops may be issued ahead of those that have ended: one or two chunks of a stage, with their sync"""


class _Pending(NamedTuple):
    op: Op
    work: Issued
    ready: int
    header: Header | None
    """of a transfer: the header that the plan expects"""


class StreamExecutor(LaneExecutor):
    """Issues one lane to `streams`, which `close` ends. Raises PlanError for a plan that is not lowered."""

    def __init__(self, given: Execution, streams: Streams, window: int = WINDOW) -> None:
        super().__init__(given)
        if not self.plan.is_lowered:
            raise PlanError(
                f"rank {self.rank} can issue one lane only; this plan has several: lower it first."
            )
        self._streams, self._window = streams, window
        self._lane = self._lanes[0]
        self._issued = 0
        self._pending: deque[_Pending] = deque()
        self._making: dict[Value, Issued] = {}
        self._add_thread("issue", self._issue_all)
        self._add_thread("completion", self._complete_all)

    def start(self) -> None:
        self._streams.settle()
        super().start()

    def set_limits(self, limits: Sequence[int]) -> None:
        if self._issued == self._lane.position:
            self._streams.settle()  # the user's own kernels come first; and the clocks stay aligned
        super().set_limits(limits)

    def freeze(self) -> Stand:
        """Issue no further op. Every issued op counts as ended, none as begun."""
        with self.gate.change():
            self._lane.limit = self._issued
            self._publish(self._lane)
            return Stand((self._issued,), (False,), (self._issued,))

    def release(self, channels: Iterable[Channel]) -> None:
        """Accepts no channel: every issued op counts as ended, so no recv is posted too early."""
        if given := list(channels):
            raise RuntimeError(
                f"rank {self.rank} cannot release recvs on {given}: its ops are issued to streams."
            )

    def rewind(self, positions: Sequence[int]) -> None:
        with self.gate.change():
            super().rewind(positions)
            self._issued = self._lane.position
        self._streams.settle()

    def close(self, timeout: float = 5.0) -> bool:
        return super().close(timeout) and self._streams.close(timeout)

    def _issue_all(self) -> None:
        try:
            while isinstance(op := self.gate.wait(self._claim), Op):
                self._issue(op)
        except BaseException as error:  # whatever it is: report it
            self._fail(self._lane, self._lane.ops[self._issued - 1], error)
        finally:
            self.gate.leave()

    def _claim(self) -> Op | Literal[False] | None:
        """The next op, None if it cannot be issued yet, False to end the thread.

        The op counts as issued from here on, so that a freeze does not miss one on its way to its stream.
        """
        if self._is_over:
            return False
        lane = self._lane
        if self._issued >= min(lane.limit, len(lane.ops), lane.position + self._window):
            return None
        op = lane.ops[self._issued]
        if not all(need in self._made or need in self._making for need in op.needs()):
            return None
        self._issued, lane.started = self._issued + 1, True
        self._publish(lane)
        return op

    def _issue(self, op: Op) -> None:
        """Give the op to its stream, to run after the ops under way that make what it needs."""
        self._check_new(op)
        ready, state, streams = monotonic_ns(), self.state, self._streams
        with self.gate.hold():
            after = list({id(w): w for need in op.needs() if (w := self._making.get(need))}.values())
        header = header_at(state, op) if op.is_transfer else None
        if header is None:
            where = ENTRY if op.kind == "embed" else COMPUTE
            work = streams.compute(where, partial(HANDLERS[op.kind], state, op, self.comm), after)
        elif op.kind == "send":
            is_signed = op.what == "kv" and state.ledger.on
            sign = partial(state.ledger.signature, (op.chunk, op.layer)) if is_signed else None
            payload = partial(payload_of, state, op)
            work = streams.send(channel_of(self.rank, op), header.pack(), payload, after, sign)
        else:
            # Also without digests: faults strike there.
            arrive = {"kv": state.receive_block, "hidden": state.receive_hidden}.get(op.what)
            arrived = partial(arrive, op) if arrive else None
            work = streams.recv(channel_of(self.rank, op), partial(land, state, op), after, arrived)
        # Waking the other thread takes the GIL from this one, so do it only when that thread waits for a first op.
        with self.gate.hold():
            is_first = not self._pending
            self._pending.append(_Pending(op, work, ready, header))
            self._making.update(dict.fromkeys(op.makes(), work))
        if is_first:
            with self.gate.change():
                pass

    def _check_new(self, op: Op) -> None:
        super()._check_new(op)
        if twice := self._making.keys() & set(op.makes()):
            raise PlanError(f"{twice.pop()} is already on its way; no op may make it a second time.")

    def _complete_all(self) -> None:
        try:
            while isinstance(oldest := self.gate.wait(self._oldest), _Pending):
                self._complete(oldest)
        except BaseException as error:
            self._fail(self._lane, self._lane.ops[self._lane.position], error)
        finally:
            self.gate.leave()

    def _oldest(self) -> _Pending | Literal[False] | None:
        if self._pending:
            return False if self.failure is not None else self._pending[0]
        return False if self._is_over else None

    def _complete(self, oldest: _Pending) -> None:
        """Wait for the oldest op, then conclude it and those after it that have ended too."""
        oldest.work.wait()
        with self.gate.hold():
            batch = list(takewhile(lambda pending: pending.work.is_done, self._pending))
        good = 0
        try:
            for pending in batch:
                self._conclude(pending, self._lane.position + good)
                good += 1
        finally:
            lane = self._lane
            with self.gate.change():
                for pending in batch[:good]:
                    self._pending.popleft()
                    for value in pending.op.makes():
                        del self._making[value]
                        self._made.add(value)
                    lane.position += 1
                lane.started = self._issued > lane.position
                self._publish(lane)

    def _conclude(self, pending: _Pending, index: int) -> None:
        """Check and record an op that has ended. Raises what the op raised, or TransferError."""
        op, lane, times, corrupt = pending.op, self._lane, pending.work.wait(), None
        if pending.header is not None and op.kind == "recv":
            came = Header.unpack(pending.work.header())
            check(came, pending.header, op)
            corrupt = self.state.check_digests(op, came, pending.work.digests()) if op.what == "kv" else None
        start = max(times.start, pending.ready)
        size = pending.header.nbytes if pending.header else 0
        moments = pending.ready, start, max(times.met, start), times.end
        self._record(lane, op, event_of(op, self.rank, lane.name, index, moments, size), corrupt)

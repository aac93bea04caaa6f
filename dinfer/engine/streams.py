"""A lowered plan on streams: one thread issues the rank's ops to streams and does not wait for them.

It issues up to the limit, and at most a window ahead of the ops that have ended, so that a pause is short. A second
thread waits for the ops in issue order, checks what arrived, records events and moves the position. An issued op cannot
be taken back, nor its recv released by a void header, so a stop counts every issued op as done.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import takewhile
from time import monotonic_ns, sleep
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

TOGETHER = 16
"""how many ops are taken from the lane at a time: each time takes the lock"""


LAG_S = 0.004
"""seconds to let ops end together, while many are under way: far less than a window of them takes"""


class _Call(NamedTuple):
    """An op, and all that the plan says of it: made once, so that issuing it only launches."""

    op: Op
    number: int
    makes: tuple[Value, ...]
    needs: tuple[Value, ...]
    """without the blocks of earlier chunks that a layer needs, which are counted"""
    header: Header | None
    """of a transfer: the header that the plan expects"""


class _Pending(NamedTuple):
    call: _Call
    work: Issued
    ready: int


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
        self._calls = [self._call(number, op) for number, op in enumerate(self._lane.ops)]
        self._issued = 0
        self._blocks: Counter[int] = Counter()
        """by layer, of how many chunks from the first on the blocks are made or being made here"""
        self._pending: deque[_Pending] = deque()
        self._coming: set[Value] = set()
        """what the ops make that have been claimed and have not ended"""
        self._making: dict[Value, Issued] = {}
        """the work that makes it, as soon as that is issued"""
        self._arriving: defaultdict[int, dict[Value, Issued]] = defaultdict(dict)
        """by layer, the blocks that are being received"""
        self._add_thread("issue", self._issue_all)
        self._add_thread("completion", self._complete_all)

    def _call(self, number: int, op: Op) -> _Call:
        needs = (Value("hidden", op.chunk, op.layer),) if op.kind == "layer" else tuple(op.needs())
        return _Call(op, number, op.makes(), needs, header_at(self.state, op) if op.is_transfer else None)

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
            self._blocks.clear()
            for call in self._calls[: self._issued]:
                self._count(call)
        self._streams.settle()

    def close(self, timeout: float = 5.0) -> bool:
        return super().close(timeout) and self._streams.close(timeout)

    def _issue_all(self) -> None:
        issuing: int | None = None
        try:
            while claimed := self.gate.wait(self._claim):
                for issuing in claimed:
                    self._issue(self._calls[issuing])
                issuing = None
        except BaseException as error:  # whatever it is: report it, of an op on its way or of the next one
            self._fail(self._lane, self._lane.ops[self._issued if issuing is None else issuing], error)
        finally:
            self.gate.leave()

    def _claim(self) -> range | None:
        """The next ops, None if none can be issued yet, an empty range to end the thread.

        They count as issued from here on, so that a freeze does not miss one on its way to its stream.
        """
        if self._is_over:
            return range(0)
        lane, first = self._lane, self._issued
        stop = min(lane.limit, len(lane.ops), lane.position + self._window, first + TOGETHER)
        for call in self._calls[first:stop]:
            is_behind_watched = self._issued > lane.position and self.watched(lane.ops[self._issued - 1])
            if is_behind_watched or not self._can_issue(call):
                break
            self._check_new(call.op)
            self._coming.update(call.makes)
            self._count(call)
            self._issued += 1
        if self._issued == first:
            return None
        lane.started = True
        self._publish(lane)
        return range(first, self._issued)

    def _can_issue(self, call: _Call) -> bool:
        if call.op.kind == "layer" and self._blocks[call.op.layer] < call.op.chunk:
            return False
        return all(need in self._made or need in self._coming for need in call.needs)

    def _count(self, call: _Call) -> None:
        """Count the blocks of the layers of which the op makes one."""
        for value in call.makes:
            if value.what == "kv":
                chunk = self._blocks[value.layer]
                while (block := Value("kv", chunk, value.layer)) in self._coming or block in self._made:
                    chunk += 1
                self._blocks[value.layer] = chunk

    def _issue(self, call: _Call) -> None:
        """Give the op to its stream, to run after the ops under way that make what it needs."""
        ready, state, streams, op = monotonic_ns(), self.state, self._streams, call.op
        with self.gate.hold():
            after = self._under_way(call)
        if call.header is None:
            where = ENTRY if op.kind == "embed" else COMPUTE
            work = streams.compute(where, partial(HANDLERS[op.kind], state, op, self.comm), after)
        elif op.kind == "send":
            is_signed = op.what == "kv" and state.ledger.on
            sign = partial(state.ledger.signature, (op.chunk, op.layer)) if is_signed else None
            payload = partial(payload_of, state, op)
            work = streams.send(channel_of(self.rank, op), call.header.pack(), payload, after, sign)
        else:
            # Also without digests: faults strike there.
            arrive = {"kv": state.receive_block, "hidden": state.receive_hidden}.get(op.what)
            arrived = partial(arrive, op) if arrive else None
            work = streams.recv(channel_of(self.rank, op), partial(land, state, op), after, arrived)
        # Waking the other thread takes the GIL from this one, so do it only when that thread waits for a first op.
        with self.gate.hold():
            is_first = not self._pending
            self._pending.append(_Pending(call, work, ready))
            self._making.update(dict.fromkeys(call.makes, work))
            if op.kind == "recv" and op.what == "kv":
                self._arriving[op.layer][op.value] = work
        if is_first:
            with self.gate.change():
                pass

    def _under_way(self, call: _Call) -> list[Issued]:
        """The work that makes what the op needs and has not ended. (What layers make, layers follow anyway.)"""
        found = [work for need in call.needs if (work := self._making.get(need))]
        if call.op.kind == "layer" and (blocks := self._arriving.get(call.op.layer)):
            found += [work for value, work in blocks.items() if value.chunk < call.op.chunk]
        return found

    def _check_new(self, op: Op) -> None:
        super()._check_new(op)
        if twice := self._coming.intersection(op.makes()):
            raise PlanError(f"{twice.pop()} is already on its way; no op may make it a second time.")

    def _complete_all(self) -> None:
        try:
            while isinstance(oldest := self.gate.wait(self._oldest), _Pending):
                self._complete(oldest)
        except BaseException as error:  # whatever the device or an op raises: report it of that op
            self._fail(self._lane, self._lane.ops[self._lane.position], error)
        finally:
            self.gate.leave()

    def _oldest(self) -> _Pending | Literal[False] | None:
        if self._pending:
            return False if self.failure is not None else self._pending[0]
        return False if self._is_over else None

    def _complete(self, oldest: _Pending) -> None:
        """Wait for the oldest op, then conclude it and those after it that have ended too."""
        # A look at each alone would take the GIL from the other thread as often.
        if len(self._pending) > TOGETHER:
            sleep(LAG_S)
        oldest.work.wait()
        with self.gate.hold():
            batch = list(takewhile(lambda pending: pending.work.is_done, self._pending))
        good = 0
        try:
            for pending in batch:
                self._conclude(pending)
                good += 1
        finally:
            lane = self._lane
            with self.gate.change():
                for pending in batch[:good]:
                    self._pending.popleft()
                    makes = pending.call.makes
                    self._made.update(makes)
                    self._coming.difference_update(makes)
                    for value in makes:
                        del self._making[value]
                        if value.what == "kv":
                            self._arriving[value.layer].pop(value, None)
                    lane.position += 1
                lane.started = self._issued > lane.position
                self._publish(lane)

    def _conclude(self, pending: _Pending) -> None:
        """Check and record an op that has ended. Raises what the op raised, or TransferError."""
        (op, number, _, _, header), lane, corrupt = pending.call, self._lane, None
        times = pending.work.wait()
        if header is not None and op.kind == "recv":
            came = Header.unpack(pending.work.header())
            check(came, header, op)
            corrupt = self.state.check_digests(op, came, pending.work.digests()) if op.what == "kv" else None
        start = max(times.start, pending.ready)
        size = header.nbytes if header else 0
        moments = pending.ready, start, max(times.met, start), max(times.end, start)
        self._record(lane, op, event_of(op, self.rank, lane.name, number, moments, size), corrupt)

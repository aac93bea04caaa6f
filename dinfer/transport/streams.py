"""Streams: work is issued to them and runs later, in order. And LocalStreams, whose streams are threads.

On NCCL the host only issues; kernels and transfers run when their stream reaches them. Transfers with one peer on one
communicator share a stream, both directions together, so a pending recv blocks a later send. `LocalStreams` behaves the
same on threads over an Exchange, for tests and for trying plans on a laptop.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dinfer.kv.digests import as_numbers
from dinfer.plan.graph import Channel
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import Comm, CommError
from dinfer.transport.header import Header, signature_of, signed

COMPUTE, ENTRY = "compute", "entry"
"""the streams without a peer: of layers, and of embeddings, which wait for nothing"""

StreamPlace = str | Channel
"""COMPUTE, ENTRY, or the channel of a transfer"""


class Times(NamedTuple):
    """When issued work started, met its peer and ended, in monotonic ns."""

    start: int
    met: int
    end: int


class Issued(Protocol):
    """Work that was issued to a stream."""

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""

    def wait(self) -> Times:
        """Wait until it has ended. Raises what it raised."""

    def header(self) -> bytes:
        """The header that arrived, of a recv that has ended."""

    def digests(self) -> tuple[int, int] | None:
        """The digests that `arrived` returned, of a recv that has ended."""


After = Sequence[Issued]
"""work that must have ended before, usually on other streams"""

MakeTensor = Callable[[], Tensor]
"""called on the stream"""

OnArrival = Callable[[Tensor, Tensor], Tensor | None]
"""called on the stream with the received signature, int64 [3], and payload; returns the block's digests, int64 [2], or
None"""


class Streams(Protocol):
    """One rank's streams. Issued work may run at any later time; its tensors must not change until then."""

    def compute(self, where: str, work: Callable[[], object], after: After) -> Issued:
        """Run `work` on stream COMPUTE or ENTRY; its result is dropped."""

    def send(
        self, channel: Channel, header: bytes, payload: MakeTensor, after: After, sign: MakeTensor | None
    ) -> Issued:
        """Send a header, with the signature, int64 [3], that `sign` returns, and then `payload`'s contiguous
        tensor."""

    def recv(self, channel: Channel, place: MakeTensor, after: After, arrived: OnArrival | None) -> Issued:
        """Receive a header, and then the payload into the contiguous tensor that `place` returns."""

    def settle(self) -> None:
        """Make later work wait for all that the calling thread has launched on this device."""

    def close(self, timeout: float) -> bool:
        """End the streams after their last work. Returns whether they ended within `timeout` seconds."""


@runtime_checkable
class StreamComm(Comm, Protocol):
    """A transport with streams."""

    def open_streams(self, device: torch.device, largest: int) -> Streams:
        """This rank's streams on its device, for payloads of at most `largest` bytes.

        All ranks must call it with the same number, in the same order among collective calls.
        """


def stream_of(rank: int, where: StreamPlace) -> str:
    """The name of the stream of `where`: one for each peer and communicator, for both directions."""
    if isinstance(where, str):
        return where
    peer = where.target if where.source == rank else where.source
    return f"{where.communicator}:{peer}"


class _Work:
    """Work on one of the LocalStreams (`Issued`)."""

    def __init__(self, gate: Gate, run: Callable[["_Work"], object], after: After) -> None:
        self._gate, self._run, self.after = gate, run, after
        self.started = self.met = self.ended = 0
        self.came = b""
        self.found: Tensor | None = None
        self.error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return bool(self.ended)

    def wait(self) -> Times:
        self._gate.wait(lambda: self.ended or None)
        if self.error is not None:
            raise self.error
        return Times(self.started, self.met or self.started, self.ended)

    def header(self) -> bytes:
        return self.came

    def digests(self) -> tuple[int, int] | None:
        return None if self.found is None else as_numbers(self.found)

    def do(self) -> None:
        self.started = monotonic_ns()
        failed = next((w.error for w in self.after if isinstance(w, _Work) and w.error), None)
        try:
            if failed is not None:
                raise CommError("work before this one failed") from failed
            self._run(self)
        except BaseException as error:  # whatever it is, `wait` raises it
            self.error = error
        with self._gate.change():
            self.ended = monotonic_ns()


class LocalStreams:
    """Streams that are threads, whose transfers use a blocking Comm. `serial`: one stream for everything, the worst
    case on CUDA."""

    def __init__(self, comm: Comm, gate: Gate, *, serial: bool = False) -> None:
        self._comm, self._gate, self._serial = comm, gate, serial
        self._queues: dict[str, deque[_Work]] = {}
        self._threads: list[threading.Thread] = []
        self._closing = False

    def compute(self, where: str, work: Callable[[], object], after: After) -> Issued:
        return self._issue(where, lambda _: work(), after)

    def send(
        self, channel: Channel, header: bytes, payload: MakeTensor, after: After, sign: MakeTensor | None
    ) -> Issued:
        def run(work: _Work) -> None:
            work.met = self._comm.send(channel, signed(header, sign()) if sign else header, payload())

        return self._issue(channel, run, after)

    def recv(self, channel: Channel, place: MakeTensor, after: After, arrived: OnArrival | None) -> Issued:
        def run(work: _Work) -> None:
            work.came = self._comm.recv_header(channel)
            work.met, out = monotonic_ns(), place()
            announced = Header.unpack(work.came).nbytes
            fits = announced == out.nbytes  # else drain it: the check of the header reports the error
            self._comm.recv_payload(channel, out if fits else torch.empty(announced, dtype=torch.uint8))
            if arrived and fits:
                work.found = arrived(signature_of(work.came), out)

        return self._issue(channel, run, after)

    def settle(self) -> None:
        pass

    def close(self, timeout: float) -> bool:
        with self._gate.change():
            self._closing = True
        for thread in self._threads:
            thread.join(timeout)
        return not any(thread.is_alive() for thread in self._threads)

    def _issue(self, where: StreamPlace, run: Callable[[_Work], object], after: After) -> Issued:
        name = "serial" if self._serial else stream_of(self._comm.rank, where)
        work = _Work(self._gate, run, after)
        with self._gate.change():
            if name not in self._queues:
                queue = self._queues[name] = deque()
                thread_name = f"rank {self._comm.rank} stream {name}"
                thread = threading.Thread(target=self._run, args=(queue,), name=thread_name, daemon=True)
                self._threads.append(thread)
                self._gate.enroll(thread.name)
                thread.start()
            self._queues[name].append(work)
        return work

    def _run(self, queue: deque[_Work]) -> None:
        def first() -> _Work | bool | None:
            if queue:
                return queue[0] if all(other.is_done for other in queue[0].after) else None
            return False if self._closing else None

        while isinstance(work := self._gate.wait(first), _Work):
            work.do()
            with self._gate.change():
                queue.popleft()
        self._gate.leave()

"""CudaStreams: a rank's streams on CUDA, one for each peer and communicator. How bytes travel, subclasses say.

Times are those of CUDA events, the only way to learn when a kernel ran; `settle` aligns their clock with the host's.
"""

import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from time import monotonic_ns, sleep
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.plan.graph import Channel
from dinfer.transport.gloo import bytes_of
from dinfer.transport.header import HEADER_BYTES, SIGNED
from dinfer.transport.streams import (
    COMPUTE,
    After,
    Issued,
    MakeTensor,
    OnArrival,
    StreamPlace,
    Times,
    stream_of,
)

LAG_S = 0.001
"""seconds by which the end of an op may be noticed late, so that several are handled at once: each look takes the GIL
from the issuing thread. Recorded times do not depend on it"""

HEADERS = 1024
"""the most headers under way; far more than the window of a StreamExecutor"""

FOUND = slice(HEADER_BYTES, HEADER_BYTES + 16)
"""the bytes after a received header, for the digests of the block that arrived"""

_HEADER = slice(0, HEADER_BYTES)


class _Computed:
    """Work on the stream of layers (`Issued`), of which only the end is marked: it starts when the work before it on
    this stream, and what it waits for, have ended."""

    stream = COMPUTE
    ended = 0
    """when it has ended, once that was asked"""

    def __init__(self, streams: "CudaStreams", after: list["_CudaWork"]) -> None:
        self._streams, self._after = streams, after
        self.end = streams.free.pop() if streams.free else _event()

    @property
    def is_done(self) -> bool:
        return bool(self.ended or self.end.query())  # type: ignore[no-untyped-call]

    def wait(self) -> Times:
        if not self.ended:
            if not self.is_done:
                sleep(LAG_S)
                self.end.synchronize()
            self.started = max([self._streams.last_end, *(other.wait().end for other in self._after)])
            self.ended = self._streams.last_end = self._streams.time_of(self.end)
            self._after.clear()
            # For work that is issued from now on. What waits for this op was issued before, and stays in order.
            self._streams.free.append(self.end)
        return Times(self.started, self.started, self.ended)

    def header(self) -> bytes:
        return b""

    def digests(self) -> tuple[int, int] | None:
        return None


class _CudaWork:
    """Work on one CUDA stream (`Issued`). Holds the tensors of its transfer until that has ended."""

    def __init__(self, stream: str, zero: tuple[torch.cuda.Event, int]) -> None:
        self.stream, self._zero = stream, zero
        self.start, self.met, self.end = (_event() for _ in range(3))
        self.kept: list[Tensor] = []
        self.came: memoryview
        """of a recv: the header that arrived and the digests of its block, on the host"""
        self.has_digests = False

    @property
    def is_done(self) -> bool:
        return bool(self.end.query())  # type: ignore[no-untyped-call]

    def wait(self) -> Times:
        if not self.is_done:
            sleep(LAG_S)
            self.end.synchronize()
        self.kept.clear()
        return Times(*(_time_of(event, self._zero) for event in (self.start, self.met, self.end)))

    def header(self) -> bytes:
        return bytes(self.came[_HEADER])

    def digests(self) -> tuple[int, int] | None:
        return struct.unpack("QQ", self.came[FOUND]) if self.has_digests else None


class HeaderToSend(NamedTuple):
    """A header, uint8 on pinned memory, and its signature, int64 on the device, if it has one there. `scratch`: memory
    for all of it on the device."""

    host: Tensor
    scratch: Tensor
    signature: Tensor | None

    def write(self, into: Tensor) -> Tensor:
        """Write it there, uint8 on the device, on the current stream. Returns `into`."""
        into.copy_(self.host, non_blocking=True)
        if self.signature is not None:
            into[SIGNED].view(torch.int64).copy_(self.signature, non_blocking=True)
        return into


class CudaStreams(ABC):
    """Streams for each peer and communicator, both directions together.

    Layers run on the device's default stream, so that the user's own kernels are ordered behind them.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._streams: dict[str, torch.cuda.Stream] = {COMPUTE: torch.cuda.default_stream(device)}
        # Allocated once: pinning memory may wait for the device.
        host = torch.zeros((HEADERS, FOUND.stop), dtype=torch.uint8, pin_memory=True)
        views = [memoryview(one) for one in host.numpy()]
        self._headers = cycle(list(zip(host, views, torch.empty_like(host, device=device), strict=True)))
        self.free: list[torch.cuda.Event] = []
        """events that no work uses any more"""
        self._of_thread = threading.local()
        self.settle()

    def compute(self, where: str, work: Callable[[], object], after: After) -> Issued:
        if where == COMPUTE:
            return self._compute(work, after)
        with self._on(where, after) as issued:
            work()
            issued.met = issued.start
        return issued

    def _compute(self, work: Callable[[], object], after: After) -> Issued:
        """The same without naming a stream, which takes longer than a launch: a thread's own is that of layers."""
        if not hasattr(self._of_thread, "device"):
            self._of_thread.device = self._device
            torch.cuda.set_device(self._device)
        stream, others = self._streams[COMPUTE], [one for one in after if isinstance(one, _CudaWork)]
        for other in others:
            stream.wait_event(other.end)
        work()
        issued = _Computed(self, others)
        issued.end.record(stream)
        return issued

    def send(
        self, channel: Channel, header: bytes, payload: MakeTensor, after: After, sign: MakeTensor | None
    ) -> Issued:
        with self._on(channel, after) as issued:
            (host, view, scratch), tensor = next(self._headers), payload()
            issued.kept = [tensor]
            view[_HEADER] = header
            # The signature of a block that this rank computed is on the device; the host does not wait for it.
            header_of = HeaderToSend(host[_HEADER], scratch[_HEADER], sign() if sign else None)
            self._put(channel, header_of, bytes_of(tensor), issued.met)
        return issued

    def recv(self, channel: Channel, place: MakeTensor, after: After, arrived: OnArrival | None) -> Issued:
        with self._on(channel, after) as issued:
            (host, issued.came, scratch), tensor = next(self._headers), place()
            issued.kept = [tensor]
            self._take(channel, scratch[_HEADER], bytes_of(tensor), issued.met)
            found = arrived(scratch[SIGNED].view(torch.int64), tensor) if arrived else None
            if found is not None:
                scratch[FOUND].view(torch.int64).copy_(found)
                issued.has_digests = True
            host.copy_(scratch, non_blocking=True)
        return issued

    @abstractmethod
    def _put(self, channel: Channel, header: HeaderToSend, payload: Tensor, met: torch.cuda.Event) -> None:
        """Send both on the current stream, and record `met` once there is room at the receiver. `payload`: uint8 on
        the device."""

    @abstractmethod
    def _take(self, channel: Channel, header: Tensor, payload: Tensor, met: torch.cuda.Event) -> None:
        """Receive both, uint8 on the device, on the current stream, and record `met` once the peer sends."""

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device):
            zero = _event()
            zero.record()
            zero.synchronize()
        self._zero = zero, monotonic_ns()
        self.last_end = 0
        """when the last layer that has been asked had ended"""

    def time_of(self, event: torch.cuda.Event) -> int:
        """When an event was, in monotonic ns."""
        return _time_of(event, self._zero)

    def close(self, timeout: float) -> bool:  # noqa: ARG002
        """Nothing to do: the executor waits for all that it has issued."""
        return True

    @contextmanager
    def _on(self, where: StreamPlace, after: After) -> Iterator[_CudaWork]:
        """Inside, the current stream is that of `where`, which waits for `after`; the host does not wait."""
        name = stream_of(self._rank, where)
        issued = _CudaWork(name, self._zero)
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream = self._streams[name]
        with torch.cuda.stream(stream):
            for other in after:
                if isinstance(other, _CudaWork | _Computed) and other.stream != name:
                    stream.wait_event(other.end)
            issued.start.record()
            yield issued
            issued.end.record()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]


def _time_of(event: torch.cuda.Event, zero: tuple[torch.cuda.Event, int]) -> int:
    """When an event was, in monotonic ns; `zero`: another one, and when that was."""
    return zero[1] + int(zero[0].elapsed_time(event) * 1e6)

"""NcclComm: processes with a GPU each. A lowered plan's messages go from GPU to GPU by NCCL, all else by gloo.

Times are those of CUDA events, the only way to learn when a kernel ran; `settle` aligns their clock with the host's.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import combinations, cycle
from time import monotonic_ns, sleep

import torch
import torch.distributed as dist
from torch import Tensor

from dinfer.config import Backend
from dinfer.kv.digests import as_numbers
from dinfer.plan.graph import Channel
from dinfer.transport.gloo import Comm, CommError, GlooComm, Store, bytes_of, wait_for
from dinfer.transport.header import HEADER_BYTES, SIGNED
from dinfer.transport.streams import (
    COMPUTE,
    After,
    Issued,
    MakeTensor,
    OnArrival,
    StreamPlace,
    Streams,
    Times,
    stream_of,
)

LAG_S = 0.001
"""seconds by which the end of an op may be noticed late, so that several are handled at once: each look takes the GIL
from the issuing thread. Recorded times do not depend on it"""

HEADERS = 1024
"""the most headers under way; far more than the window of a StreamExecutor"""

_FOUND = slice(HEADER_BYTES, HEADER_BYTES + 16)
"""the bytes after a received header, for the digests of the block that arrived"""


def has_nccl() -> bool:
    """Whether this torch has NCCL and finds a GPU."""
    return torch.cuda.is_available() and dist.is_available() and dist.is_nccl_available()


def open_comm(backend: Backend, rank: int, world_size: int, store: Store, start_timeout: float) -> Comm:
    """Connect by gloo or nccl. Raises CommError if the ranks do not meet within `start_timeout` seconds."""
    kind = NcclComm if backend == "nccl" else GlooComm
    return kind(rank, world_size, store, start_timeout)


class NcclComm(GlooComm):
    """GlooComm, and streams on NCCL. The NCCL groups are made with the first streams, when ranks have agreed on a
    plan."""

    def __init__(self, rank: int, world_size: int, store: Store, start_timeout: float) -> None:
        # On an error abort the communicator, not the process: the rank must still report where it stands.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        super().__init__(rank, world_size, store, start_timeout)
        self._nccl: dict[str, dist.ProcessGroup] = {}

    def open_streams(self, device: torch.device) -> Streams:
        if not self._nccl:
            self._connect(device)
        return CudaStreams(self.rank, device, self._nccl)

    def _connect(self, device: torch.device) -> None:
        """Make the groups, and each pair's connection by a first message, which waits for it.

        Without `device_id=`: with it, the messages of all pairs would share one queue.
        """
        try:
            word = torch.zeros(1, dtype=torch.uint8, device=device)
            for name in ("hidden", "kv"):
                group = dist.new_group(backend="nccl", timeout=timedelta(days=7))
                assert isinstance(group, dist.ProcessGroup)
                self._nccl[name] = group
                for low, high in combinations(range(self.world_size), 2):
                    for sender, receiver in ((low, high), (high, low)):
                        if self.rank == sender:
                            wait_for(dist.isend(word, group=group, group_dst=receiver))
                        elif self.rank == receiver:
                            wait_for(dist.irecv(word, group=group, group_src=sender))
                torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise CommError(f"rank {self.rank} could not connect by NCCL: {error}") from error


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
        self.came: Tensor
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
        return Times(self._at(self.start), self._at(self.met), self._at(self.end))

    def header(self) -> bytes:
        return self.came[:HEADER_BYTES].numpy().tobytes()

    def digests(self) -> tuple[int, int] | None:
        return as_numbers(self.came[_FOUND].view(torch.int64)) if self.has_digests else None

    def _at(self, event: torch.cuda.Event) -> int:
        zero, ns = self._zero
        return ns + int(zero.elapsed_time(event) * 1e6)


class CudaStreams:
    """CUDA streams with NCCL: one stream for each peer and communicator, as NCCL has.

    Layers run on the device's default stream, so that the user's own kernels are ordered behind them.
    """

    def __init__(self, rank: int, device: torch.device, groups: dict[str, dist.ProcessGroup]) -> None:
        self._rank, self._device, self._groups = rank, device, groups
        self._streams: dict[str, torch.cuda.Stream] = {COMPUTE: torch.cuda.default_stream(device)}
        # Allocated once: pinning memory may wait for the device.
        host = torch.empty((HEADERS, _FOUND.stop), dtype=torch.uint8, pin_memory=True)
        self._headers = cycle(zip(host, torch.empty_like(host, device=device), strict=True))
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
        group, peer = self._groups[channel.communicator], channel.target
        with self._on(channel, after) as issued:
            (host, announced), tensor = next(self._headers), payload()
            issued.kept = [tensor]
            host[:HEADER_BYTES].copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
            announced.copy_(host, non_blocking=True)
            if sign:
                # The signature of a block that this rank computed is on the device; the host does not wait for it.
                announced[SIGNED].view(torch.int64).copy_(sign(), non_blocking=True)
            wait_for(dist.isend(announced[:HEADER_BYTES], group=group, group_dst=peer))
            issued.met.record()
            wait_for(dist.isend(bytes_of(tensor), group=group, group_dst=peer))
        return issued

    def recv(self, channel: Channel, place: MakeTensor, after: After, arrived: OnArrival | None) -> Issued:
        group, peer = self._groups[channel.communicator], channel.source
        with self._on(channel, after) as issued:
            (issued.came, announced), tensor = next(self._headers), place()
            issued.kept = [tensor]
            wait_for(dist.irecv(announced[:HEADER_BYTES], group=group, group_src=peer))
            issued.met.record()
            wait_for(dist.irecv(bytes_of(tensor), group=group, group_src=peer))
            # A copy, since the ledger keeps the signature and the header's memory is used again.
            found = arrived(announced[SIGNED].view(torch.int64).clone(), tensor) if arrived else None
            if found is not None:
                announced[_FOUND].view(torch.int64).copy_(found)
                issued.has_digests = True
            issued.came.copy_(announced, non_blocking=True)
        return issued

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
        zero, ns = self._zero
        return ns + int(zero.elapsed_time(event) * 1e6)

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

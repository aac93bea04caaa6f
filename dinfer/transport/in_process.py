"""Exchange: the transport between ranks that are threads of one process, for tests, lessons, laptops and one GPU.

Like gloo, it keeps the order of a channel's messages; sends wait for their recv (rendezvous) or are buffered. Its
streams on a CPU behave like NCCL: transfers with one peer on one communicator run in issue order ("pairs"), or all of a
rank's work does ("serial"), the worst case on CUDA. On a GPU they are CUDA's, and messages are copied within it.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from time import monotonic_ns
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dinfer.plan.graph import Channel
from dinfer.transport.cuda_streams import CudaStreams, HeaderToSend
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import CommError
from dinfer.transport.header import HEADER_BYTES
from dinfer.transport.streams import After, Issued, LocalStreams, Streams

StreamOrder = Literal["pairs", "serial"]


class _Message:
    def __init__(self, header: bytes, payload: Tensor | None) -> None:
        self.header, self.payload = header, payload
        self.met = 0
        self.received = False


class _OnGpu(NamedTuple):
    """A message in memory of its own on the GPU: header, then payload, uint8. `written`: when both are there."""

    data: Tensor
    written: torch.cuda.Event


class Exchange:
    """The queues that all ranks of one process share."""

    def __init__(
        self, world_size: int, gate: Gate, *, rendezvous: bool = True, streams: StreamOrder = "pairs"
    ) -> None:
        self.world_size, self.gate, self.rendezvous, self.streams = world_size, gate, rendezvous, streams
        self.queues: dict[Channel, deque[_Message]] = defaultdict(deque)
        self.taken: dict[Channel, _Message] = {}
        self.on_gpu: dict[Channel, deque[_OnGpu]] = defaultdict(deque)
        """messages that have been issued to a stream and not yet to that of their receiver"""
        self.gathered: dict[int, dict[int, bytes]] = defaultdict(dict)
        """gathers under way: by number and rank, what the rank passed"""
        self.closed = False

    def comm(self, rank: int) -> "LocalComm":
        """The transport of one rank."""
        return LocalComm(self, rank)

    def close(self) -> None:
        """End every rank's waits with CommError."""
        with self.gate.change():
            self.closed = True


class LocalComm:
    """One rank's end of an Exchange."""

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self.rank, self.world_size = rank, exchange.world_size
        self._exchange = exchange
        self._gathers = 0

    def send(self, channel: Channel, header: bytes, payload: Tensor | None) -> int:
        exchange = self._exchange
        if payload is not None and not exchange.rendezvous:
            payload = payload.clone()
            if payload.is_cuda:  # the receiver copies on another stream
                torch.cuda.current_stream(payload.device).synchronize()
        message = _Message(header, payload)
        with exchange.gate.change():
            exchange.queues[channel].append(message)
        if not exchange.rendezvous:
            return monotonic_ns()
        self._wait(lambda: message.received, f"sending to rank {channel.target}")
        return message.met

    def recv_header(self, channel: Channel) -> bytes:
        exchange = self._exchange
        self._wait(lambda: bool(exchange.queues[channel]), f"receiving from rank {channel.source}")
        with exchange.gate.change():
            message = exchange.queues[channel].popleft()
            message.met = monotonic_ns()
            if message.payload is None:
                message.received = True
            else:
                exchange.taken[channel] = message
        return message.header

    def recv_payload(self, channel: Channel, out: Tensor) -> None:
        message = self._exchange.taken.pop(channel)
        assert message.payload is not None
        if out.is_cuda:  # the sender may have launched its kernels only now
            torch.cuda.current_stream(out.device).wait_stream(torch.cuda.default_stream(out.device))
        out.view(-1).copy_(message.payload.reshape(-1).view(out.dtype))
        with self._exchange.gate.change():
            message.received = True

    def ahead(self, channel: Channel, most: int) -> None:
        """Nothing travels here."""

    def all_gather(self, data: bytes) -> list[bytes]:
        exchange = self._exchange
        number, self._gathers = self._gathers, self._gathers + 1
        with exchange.gate.change():
            parts = exchange.gathered[number]
            parts[self.rank] = data
        self._wait(lambda: len(parts) == self.world_size, "gathering from all ranks")
        with exchange.gate.change():
            exchange.gathered.pop(number, None)  # the first rank here removes it; all others hold `parts`
        return [parts[rank] for rank in range(self.world_size)]

    def open_streams(self, device: torch.device, largest: int) -> Streams:  # noqa: ARG002
        if device.type == "cuda":
            return LocalCudaStreams(self, device)
        return LocalStreams(self, self._exchange.gate, serial=self._exchange.streams == "serial")

    def hand_over(self, channel: Channel, data: Tensor, written: torch.cuda.Event) -> None:
        """Give the receiver a message whose copy has been issued to a stream."""
        with self._exchange.gate.change():
            self._exchange.on_gpu[channel].append(_OnGpu(data, written))

    def take_over(self, channel: Channel) -> tuple[Tensor, torch.cuda.Event]:
        """The next message of a channel; waits until its sender has issued it. Raises CommError."""
        queue = self._exchange.on_gpu[channel]
        self._wait(lambda: bool(queue), f"receiving from rank {channel.source}")
        return queue.popleft()

    def close(self) -> None:
        self._exchange.close()

    def _wait(self, happened: Callable[[], bool], doing: str) -> None:
        exchange = self._exchange
        exchange.gate.wait(lambda: exchange.closed or happened() or None)
        if not happened():
            raise CommError(f"{doing} failed: the ranks were closed")


class LocalCudaStreams(CudaStreams):
    """One rank's CUDA streams, whose messages are copied within the GPU that all ranks share.

    A stream never waits for what has not been issued yet: the thread that issues a recv waits until its send has been.
    So it does not matter that all ranks' layers share one stream, nor how many streams the GPU runs side by side; a
    lowered plan is proved for ranks that do one op after another.
    """

    def __init__(self, comm: LocalComm, device: torch.device) -> None:
        super().__init__(comm.rank, device)
        self._comm = comm

    def compute(self, where: str, work: Callable[[], object], after: After) -> Issued:
        # Other ranks' layers lie between this rank's on their stream: the start has to be marked, too.
        with self._on(where, after) as issued:
            work()
            issued.met = issued.start
        return issued

    def _put(self, channel: Channel, header: HeaderToSend, payload: Tensor, met: torch.cuda.Event) -> None:
        met.record()
        data = torch.empty(HEADER_BYTES + len(payload), dtype=torch.uint8, device=payload.device)
        header.write(data[:HEADER_BYTES])
        data[HEADER_BYTES:].copy_(payload, non_blocking=True)
        written = torch.cuda.Event()  # type: ignore[no-untyped-call]
        written.record()
        self._comm.hand_over(channel, data, written)

    def _take(self, channel: Channel, header: Tensor, payload: Tensor, met: torch.cuda.Event) -> None:
        data, written = self._comm.take_over(channel)
        stream = torch.cuda.current_stream(payload.device)
        stream.wait_event(written)
        met.record()
        header.copy_(data[:HEADER_BYTES], non_blocking=True)
        came = data[HEADER_BYTES:][: len(payload)]  # of another size only by a fault, which the header tells
        payload[: len(came)].copy_(came, non_blocking=True)
        data.record_stream(
            stream
        )  # it was allocated on the sender's, and is not used again before this has run

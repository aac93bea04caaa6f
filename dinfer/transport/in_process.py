"""Exchange: the transport between ranks that are threads of one process, for tests, lessons and laptops.

Like gloo, it keeps the order of a channel's messages; sends wait for their recv (rendezvous) or are buffered. Its
streams behave like NCCL: transfers with one peer on one communicator run in issue order ("pairs"), or all of a rank's
work does ("serial"), the worst case on CUDA.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from time import monotonic_ns
from typing import Literal

import torch
from torch import Tensor

from dinfer.plan.graph import Channel
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import CommError
from dinfer.transport.streams import LocalStreams, Streams

StreamOrder = Literal["pairs", "serial"]


class _Message:
    def __init__(self, header: bytes, payload: Tensor | None) -> None:
        self.header, self.payload = header, payload
        self.met = 0
        self.received = False


class Exchange:
    """The queues that all ranks of one process share."""

    def __init__(
        self, world_size: int, gate: Gate, *, rendezvous: bool = True, streams: StreamOrder = "pairs"
    ) -> None:
        self.world_size, self.gate, self.rendezvous, self.streams = world_size, gate, rendezvous, streams
        self.queues: dict[Channel, deque[_Message]] = defaultdict(deque)
        self.taken: dict[Channel, _Message] = {}
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
        return LocalStreams(self, self._exchange.gate, serial=self._exchange.streams == "serial")

    def close(self) -> None:
        self._exchange.close()

    def _wait(self, happened: Callable[[], bool], doing: str) -> None:
        exchange = self._exchange
        exchange.gate.wait(lambda: exchange.closed or happened() or None)
        if not happened():
            raise CommError(f"{doing} failed: the ranks were closed")

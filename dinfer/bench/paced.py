"""A slow link without root: payloads arrive as late as a link of a given speed would deliver them.

For `dinfer bench planner` where hosts of its own (`lab.hosts`) cannot be made. A payload is received as ever, and then
kept until the last of its bytes would have arrived; a block stands still while a hidden state travels the same link, as
in `transport.precedence`. What a network costs the CPU, and its latency, stay those of this machine.
"""

import threading
from collections import Counter
from collections.abc import Mapping
from time import perf_counter, sleep

from torch import Tensor

from dinfer.plan.graph import Channel
from dinfer.transport.gloo import Comm

PIECE_S = 0.003
"""what a block travels at once, before a hidden state may go first"""


class PacedComm:
    """`comm`, with limits on what it receives. `bytes_per_s`: by link (source, target)."""

    def __init__(self, comm: Comm, bytes_per_s: Mapping[tuple[int, int], float]) -> None:
        self._comm, self._speeds = comm, bytes_per_s
        self.rank, self.world_size = comm.rank, comm.world_size
        self._free = threading.Condition()
        self._hidden = Counter[int]()
        """how many hidden states travel here, by source"""
        self._busy = set[int]()
        """sources of which a piece is travelling"""

    def send(self, channel: Channel, header: bytes, payload: Tensor | None) -> int:
        return self._comm.send(channel, header, payload)

    def recv_header(self, channel: Channel) -> bytes:
        return self._comm.recv_header(channel)

    def recv_payload(self, channel: Channel, out: Tensor) -> None:
        self._comm.recv_payload(channel, out)
        if speed := self._speeds.get((channel.source, channel.target)):
            self._travel(channel, out.nbytes / speed)

    def ahead(self, channel: Channel, most: int) -> None:
        """A paced link carries a payload only once it is asked for."""

    def all_gather(self, data: bytes) -> list[bytes]:
        return self._comm.all_gather(data)

    def close(self) -> None:
        self._comm.close()

    def _travel(self, channel: Channel, seconds: float) -> None:
        """Return once the link has carried this payload, one piece at a time."""
        first, source = channel.communicator != "kv", channel.source
        with self._free:
            self._hidden[source] += first
        while seconds > 0:
            with self._free:
                self._free.wait_for(lambda: source not in self._busy and (first or not self._hidden[source]))
                self._busy.add(source)
            began = perf_counter()
            sleep(seconds if first else min(seconds, PIECE_S))
            seconds -= perf_counter() - began
            with self._free:
                self._busy.remove(source)
                self._hidden[source] -= first
                self._free.notify_all()
            if first:
                return

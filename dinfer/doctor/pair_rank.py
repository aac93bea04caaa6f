"""A rank of the doctor: it measures the link to each other rank, and answers while others measure.

A header's first 8 bytes say how many bytes of payload follow, which an empty header answers, or that this
link has been measured.
"""

from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch

from dinfer.plan.graph import Channel
from dinfer.transport.gloo import Comm
from dinfer.transport.header import HEADER_BYTES

PINGS = 20

WARM_UP = 2

SIZES = (1 << 18, 1 << 20, 8 << 20, 8 << 20, 8 << 20, 8 << 20)

END = -1

Clock = Callable[[], float]


class PairSpeed(NamedTuple):
    """The link from one rank to another: seconds for a small message, bytes a second for large ones."""

    source: int
    target: int
    latency_s: float
    bytes_per_s: float


def measure_links(comm: Comm, seconds: float) -> Iterator[PairSpeed]:
    """This rank's links, as they are measured, one link of all ranks at a time; each gets about `seconds`."""
    for source in range(comm.world_size):
        for target in range(comm.world_size):
            if source == target:
                continue
            comm.all_gather(b"p")
            if comm.rank == source:
                yield PairEnd(comm, target).measure(seconds)
            elif comm.rank == target:
                answer(comm, source)
    comm.all_gather(b"e")  # nobody leaves while another still needs it


def answer(comm: Comm, source: int) -> None:
    """Take what `source` sends, until it says that it is done."""
    there, back = Channel("kv", source, comm.rank), Channel("kv", comm.rank, source)
    out = torch.empty(max(SIZES), dtype=torch.uint8)
    while (size := int.from_bytes(comm.recv_header(there)[:8], "little", signed=True)) != END:
        if size:
            comm.recv_payload(there, out[:size])
        comm.send(back, bytes(HEADER_BYTES), None)


class PairEnd:
    """The end of a link that measures. `clock` counts seconds."""

    def __init__(self, comm: Comm, target: int, clock: Clock = perf_counter) -> None:
        self._comm, self._clock = comm, clock
        self._there, self._back = Channel("kv", comm.rank, target), Channel("kv", target, comm.rank)
        self._data = torch.zeros(max(SIZES), dtype=torch.uint8)

    def measure(self, seconds: float) -> PairSpeed:
        deadline = self._clock() + seconds
        latency = self._latency(deadline - seconds / 2)
        speed = self._speed(deadline, latency)
        self._say(END)
        return PairSpeed(self._there.source, self._there.target, latency, speed)

    def _latency(self, deadline: float) -> float:
        trips: list[float] = []
        while len(trips) < WARM_UP + 1 or (len(trips) < WARM_UP + PINGS and self._clock() < deadline):
            trips.append(self._trip(0))
        return median(trips[WARM_UP:]) / 2

    def _speed(self, deadline: float, latency: float) -> float:
        """The median at the largest size that there was time for: a slow link gets no message too many."""
        speeds: dict[int, list[float]] = {}
        for size in SIZES:
            if speeds and self._clock() + size / median(speeds[max(speeds)]) > deadline:
                break
            took = self._trip(size)
            # Less what a trip takes without payload: never all of it, as that was measured at another moment.
            speeds.setdefault(size, []).append(size / max(took - 2 * latency, took / 2))
        return median(speeds[max(speeds)])

    def _trip(self, size: int) -> float:
        started = self._clock()
        self._say(size)
        self._comm.recv_header(self._back)
        return self._clock() - started

    def _say(self, size: int) -> None:
        header = size.to_bytes(8, "little", signed=True).ljust(HEADER_BYTES, b"\0")
        self._comm.send(self._there, header, self._data[:size] if size > 0 else None)

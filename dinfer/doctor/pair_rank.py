"""What a rank of the doctor runs: it measures its link to each other rank, and answers while others measure.

The first 8 bytes of a header are the number of payload bytes that follow, which the other side answers with an empty
header, or END once the link has been measured.
"""

from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter

import torch

from dinfer.doctor.report import PairSpeed
from dinfer.plan.graph import Channel
from dinfer.transport.gloo import Comm
from dinfer.transport.header import HEADER_BYTES

PINGS = 20

WARM_UP = 2

SIZES = (1 << 18, 1 << 20, 8 << 20, 8 << 20, 8 << 20, 8 << 20)

END = -1

Clock = Callable[[], float]


def measure_links(comm: Comm, seconds: float) -> Iterator[PairSpeed]:
    """Measure this rank's links; only one link of all ranks is measured at a time, each for about `seconds`."""
    for source in range(comm.world_size):
        for target in range(comm.world_size):
            if source == target:
                continue
            comm.all_gather(b"p")
            if comm.rank == source:
                yield PairEnd(comm, target).measure(seconds)
            elif comm.rank == target:
                answer(comm, source)
    comm.all_gather(b"e")  # a rank that left now would break the measurements of others


def answer(comm: Comm, source: int) -> None:
    """Answer every message of `source` until END comes."""
    there, back = Channel("kv", source, comm.rank), Channel("kv", comm.rank, source)
    out = torch.empty(max(SIZES), dtype=torch.uint8)
    while (size := int.from_bytes(comm.recv_header(there)[:8], "little", signed=True)) != END:
        if size:
            comm.recv_payload(there, out[:size])
        comm.send(back, bytes(HEADER_BYTES), None)


class PairEnd:
    """The measuring end of a link. `clock` counts seconds."""

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
        """The median at the largest size for which there was time, so that a slow link is not flooded."""
        speeds: dict[int, list[float]] = {}
        for size in SIZES:
            if speeds and self._clock() + size / median(speeds[max(speeds)]) > deadline:
                break
            took = self._trip(size)
            # Minus the latency, but at least half of the time remains: the latency was measured at another moment.
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

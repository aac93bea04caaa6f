"""What a rank of the doctor runs: it measures its link to each other rank, and answers while others measure.

The first 8 bytes of a header are the number of payload bytes that follow, which the other side answers with an empty
header, or END once the link has been measured.
"""

from collections.abc import Callable, Iterator
from itertools import permutations
from statistics import median
from time import perf_counter

import torch

from dinfer.doctor.report import PairSpeed
from dinfer.plan.graph import Channel
from dinfer.transport.gloo import Comm
from dinfer.transport.header import HEADER_BYTES

PINGS, WARM_UP = 20, 2

SIZES = (1 << 18, 1 << 20, 8 << 20, 8 << 20, 8 << 20, 8 << 20)

END = -1


def measure_links(comm: Comm, seconds: float) -> Iterator[PairSpeed]:
    """Measure this rank's links; only one link of all ranks is measured at a time, each for about `seconds`."""
    for source, target in permutations(range(comm.world_size), 2):
        comm.all_gather(b"p")
        if comm.rank == source:
            yield measure_link(comm, target, seconds)
        elif comm.rank == target:
            _answer(comm, source)
    comm.all_gather(b"e")  # a rank that left now would break the measurements of others


def measure_link(
    comm: Comm, target: int, seconds: float, clock: Callable[[], float] = perf_counter
) -> PairSpeed:
    """Measure the link to `target`, which answers. `clock` counts seconds."""
    there, back = Channel("kv", comm.rank, target), Channel("kv", target, comm.rank)
    data = torch.zeros(max(SIZES), dtype=torch.uint8)
    deadline = clock() + seconds

    def say(size: int) -> None:
        header = size.to_bytes(8, "little", signed=True).ljust(HEADER_BYTES, b"\0")
        comm.send(there, header, data[:size] if size > 0 else None)

    def trip(size: int) -> float:
        started = clock()
        say(size)
        comm.recv_header(back)
        return clock() - started

    trips: list[float] = []
    while len(trips) < WARM_UP + 1 or (len(trips) < WARM_UP + PINGS and clock() < deadline - seconds / 2):
        trips.append(trip(0))
    latency = median(trips[WARM_UP:]) / 2
    speeds: dict[int, list[float]] = {}
    for size in SIZES:  # as long as there is time, so that a slow link is not flooded
        if speeds and clock() + size / median(speeds[max(speeds)]) > deadline:
            break
        took = trip(size)
        # Minus the latency, but at least half of the time remains: the latency was measured at another moment.
        speeds.setdefault(size, []).append(size / max(took - 2 * latency, took / 2))
    say(END)
    return PairSpeed(comm.rank, target, latency, median(speeds[max(speeds)]))


def _answer(comm: Comm, source: int) -> None:
    """Answer every message of `source` until END comes."""
    there, back = Channel("kv", source, comm.rank), Channel("kv", comm.rank, source)
    out = torch.empty(max(SIZES), dtype=torch.uint8)
    while (size := int.from_bytes(comm.recv_header(there)[:8], "little", signed=True)) != END:
        if size:
            comm.recv_payload(there, out[:size])
        comm.send(back, bytes(HEADER_BYTES), None)

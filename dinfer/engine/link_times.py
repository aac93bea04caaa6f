"""What each link between ranks carries, alone and with all busy, measured by all ranks together: over gloo by messages
that are answered, on streams (NCCL, CUDA IPC) by the times at which messages arrive one after another."""

import threading
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from dinfer.plan.graph import Channel
from dinfer.plan.ops import Value
from dinfer.planner.machine import LinkSpeed
from dinfer.trace.transfers import LinkRanks
from dinfer.transport.gloo import Comm
from dinfer.transport.header import Header
from dinfer.transport.streams import Issued, StreamComm, Streams

PINGS, MESSAGES = 10, 3

TOGETHER_S = 0.3
"""seconds in which all links are kept busy, at least"""

LARGEST = 1 << 20
"""bytes of a message, at most"""

SMALL = 8
"""bytes of one that shows what a message takes without payload"""

STREAMED = 8
"""messages that are issued to streams at once"""

CLOSE_S = 30.0


def _pairs(comm: Comm) -> list[LinkRanks]:
    return [(a, b) for a in range(comm.world_size) for b in range(comm.world_size) if a != b]


def time_links(comm: Comm, nbytes: int) -> list[LinkSpeed]:
    """What every link carries over gloo, in messages of `nbytes` bytes or 1 MiB if that is less; the same list on every
    rank, empty for one rank."""
    size, pairs = min(nbytes, LARGEST), _pairs(comm)
    if not pairs:
        return []
    alone = dict[tuple[int, int], tuple[float, float, float]]()
    for pair in pairs:
        comm.all_gather(b"l")  # the others are quiet
        if comm.rank in pair:
            alone[pair] = _alone(comm, *pair, size)
    comm.all_gather(b"t")
    together = _together(comm, pairs, size)
    # The source has measured a link alone, the target what came when all were busy.
    sent = _all(comm, [number for pair in pairs for number in alone.get(pair, (0.0, 0.0, 0.0))])
    came = _all(comm, [together.get(pair, 0.0) for pair in pairs])
    found = list[LinkSpeed]()
    for n, (source, target) in enumerate(pairs):
        latency, speed, ahead = sent[source][3 * n : 3 * n + 3]
        busy = size / max(came[target][n] - latency, came[target][n] / 10)
        found.append(LinkSpeed(source, target, latency, speed, min(busy, speed), ahead))
    return found


def _all(comm: Comm, numbers: Sequence[float]) -> list[list[float]]:
    """Every rank's numbers, by rank; what the receiver of a link has measured counts."""
    data = torch.tensor(numbers, dtype=torch.float64).numpy().tobytes()
    return [torch.frombuffer(bytearray(part), dtype=torch.float64).tolist() for part in comm.all_gather(data)]


def _header(nbytes: int, *, last: bool = True) -> bytes:
    return Header(0, Value("kv", 0, 0), int(last), "float32", nbytes).pack()


def _send(comm: Comm, target: int, payload: Tensor, *, last: bool = True) -> None:
    comm.send(Channel("kv", comm.rank, target), _header(payload.nbytes, last=last), payload)


def _recv(comm: Comm, source: int, into: Tensor) -> bool:
    """Receive a message; whether it was the last."""
    channel = Channel("kv", source, comm.rank)
    header = Header.unpack(comm.recv_header(channel))
    comm.recv_payload(channel, into)
    return bool(header.tokens)


def _alone(comm: Comm, source: int, target: int, size: int) -> tuple[float, float, float]:
    """Of a quiet link, for its source: seconds of a small message, bytes per second, and how many bytes are still on
    their way when a send ends. The target answers each message by a small one, so that one clock measures all."""
    small, payload = torch.zeros(8, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)

    def there_and_back(message: Tensor) -> tuple[float, float]:
        """Seconds until the send has ended, and until the answer is there."""
        began = perf_counter()
        if comm.rank == target:
            _recv(comm, source, message)
            _send(comm, source, small)
            return 1.0, 1.0
        _send(comm, target, message)
        sent = perf_counter() - began
        _recv(comm, target, small)
        return sent, perf_counter() - began

    latency = median([there_and_back(small)[1] / 2 for _ in range(PINGS)][1:])
    both = [there_and_back(payload) for _ in range(MESSAGES + 1)][1:]
    return quiet_link(latency, median(sent for sent, _ in both), median(back for _, back in both), size)


def quiet_link(latency: float, sent: float, back: float, size: int) -> tuple[float, float, float]:
    """Latency, bytes per second and bytes ahead, from seconds: of a small message, until the send of one of `size`
    bytes had ended, and until its answer was there. Where all cores are busy, a small message may have taken as long
    as a large one."""
    moving = max(back - 2 * latency, back / 10)
    speed = size / moving
    return latency, speed, min(max(0.0, (back - latency - sent) * speed), size)


def _together(comm: Comm, pairs: Sequence[tuple[int, int]], size: int) -> dict[tuple[int, int], float]:
    """Seconds of a message that this rank receives over each link while all are busy, by link."""
    found: dict[tuple[int, int], float] = {}
    errors = list[BaseException]()

    def sender(target: int) -> None:
        payload, began = torch.zeros(size, dtype=torch.uint8), perf_counter()
        for n in range(1 << 30):
            last = n >= MESSAGES and perf_counter() - began > TOGETHER_S
            _send(comm, target, payload, last=last)
            if last:
                return

    def receiver(source: int) -> None:
        into, times = torch.empty(size, dtype=torch.uint8), list[float]()
        while True:
            last = _recv(comm, source, into)
            times.append(perf_counter())
            if last:
                break
        found[source, comm.rank] = (times[-1] - times[0]) / (len(times) - 1)

    def run(call: Callable[[int], None], peer: int) -> None:
        try:
            call(peer)
        except BaseException as error:  # raised below, on the thread that asked
            errors.append(error)

    calls = [(sender, b) for a, b in pairs if a == comm.rank] + [
        (receiver, a) for a, b in pairs if b == comm.rank
    ]
    threads = [threading.Thread(target=run, args=call, name="dinfer links", daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


# -- streams


def time_stream_links(comm: StreamComm, device: torch.device, nbytes: int) -> list[LinkSpeed]:
    """The same on streams, in messages of `nbytes` bytes from device to device, by the device's own clock.

    A link's times are those from the end of one message to the end of the next, of messages that are all issued at
    once, so that no host is in between.
    """
    pairs = _pairs(comm)
    if not pairs:
        return []
    streams = comm.open_streams(device, max(nbytes, SMALL))
    try:
        probe = _StreamProbe(comm.rank, device, streams)
        alone = dict[LinkRanks, tuple[float, float]]()
        for pair in pairs:
            comm.all_gather(b"l")  # the others are quiet
            small, large = (probe.periods([pair], size) for size in (SMALL, nbytes))
            if pair in small:
                alone[pair] = small[pair], large[pair]
        comm.all_gather(b"t")
        together = probe.periods(pairs, nbytes)
        comm.all_gather(b"e")
    finally:
        streams.close(CLOSE_S)
    came = _all(comm, [number for pair in pairs for number in alone.get(pair, (0.0, 0.0))])
    busy = _all(comm, [together.get(pair, 0.0) for pair in pairs])
    found = list[LinkSpeed]()
    for n, (source, target) in enumerate(pairs):
        latency, took = came[target][2 * n : 2 * n + 2]
        speed = nbytes / max(took - latency, took / 10)
        shared = nbytes / max(busy[target][n] - latency, busy[target][n] / 10)
        found.append(LinkSpeed(source, target, latency, speed, min(speed, shared)))
    return found


class _StreamProbe:
    """Issues messages to one rank's streams."""

    def __init__(self, rank: int, device: torch.device, streams: Streams) -> None:
        self._rank, self._device, self._streams = rank, device, streams

    def periods(self, pairs: Sequence[LinkRanks], nbytes: int) -> dict[LinkRanks, float]:
        """Seconds from one message of so many bytes to the next on each of these links that leads here, with all of
        them busy. All ranks issue in the same order, so that none waits for another in a circle; the first messages
        connect and warm up."""
        payload, into = (torch.zeros(nbytes, dtype=torch.uint8, device=self._device) for _ in range(2))
        issued: dict[LinkRanks, list[Issued]] = {pair: [] for pair in pairs if self._rank in pair}
        for _ in range(STREAMED + 1):
            for pair in issued:
                channel = Channel("kv", *pair)
                if pair[0] == self._rank:
                    work = self._streams.send(channel, _header(nbytes), lambda: payload, [], None)
                else:
                    work = self._streams.recv(channel, lambda: into, [], None)
                issued[pair].append(work)
        ends = {pair: [work.wait().end for work in works] for pair, works in issued.items()}
        return {
            pair: max(1, times[-1] - times[0]) / (len(times) - 1) / 1e9
            for pair, times in ends.items()
            if pair[1] == self._rank
        }

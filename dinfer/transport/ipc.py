"""IpcComm: processes that share one GPU. A lowered plan's messages stay on it; all else goes by gloo.

Each rank has boxes in its GPU memory for each channel that leads to it, and its peers map that memory (CUDA IPC). A
send waits on its stream for an empty box, copies into it and counts up; the recv waits for that count, copies out of
the box and counts up in its turn. The counts lie in the same memory, where streams wait for them and write them: no
host takes part, and no payload goes through host memory.

A GPU runs one process at a time and takes some 0.1 ms to change to another, so there are many boxes: with one, it would
change twice for each message.
"""

import ctypes
import pickle
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from dinfer.plan.graph import Channel
from dinfer.transport.cuda_streams import CudaStreams, HeaderToSend
from dinfer.transport.gloo import CommError, GlooComm
from dinfer.transport.header import HEADER_BYTES
from dinfer.transport.streams import Streams

COMMUNICATORS = ("hidden", "kv")

_SHARED_BYTES = 4096
"""the most that describes a rank's memory to its peers"""

_ALIGNED = 256
"""payloads begin at a multiple of so many bytes"""

BOXES_BYTES = 8 << 20
"""of the boxes of a channel, if its messages are small enough for FEWEST of them: little beside what CUDA takes for a
process, so that nobody counts it before loading"""

FEWEST, MOST = 4, 256
"""boxes of a channel"""

_RELEASED = 1 << 30
"""a count that no run reaches: who waits for it or less goes on"""


def has_ipc() -> bool:
    """Whether processes can share this machine's GPU memory, and streams can wait for values in it. (Not on Jetson
    boards, whose memory is the host's.)"""
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).is_integrated:
        return False
    try:
        _driver()
    except (OSError, AttributeError):
        return False
    return True


class IpcComm(GlooComm):
    """GlooComm, and streams on one GPU that all ranks share."""

    _memory: "_SharedMemory | None" = None

    def open_streams(self, device: torch.device, largest: int) -> Streams:
        if self._memory is None or self._memory.largest < largest:
            self._memory = self._share(device, largest)
        return IpcStreams(self.rank, device, self._memory)

    def close(self) -> None:
        if self._memory is not None:
            self._memory.release()
            self._memory = None
        super().close()

    def _share(self, device: torch.device, largest: int) -> "_SharedMemory":
        """New memory for messages of at most `largest` bytes, mapped by all. Raises CommError."""
        try:
            own = torch.zeros(_SharedMemory.size(self.world_size, largest), dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            data = pickle.dumps((uuid, reduce_tensor(own)))  # type: ignore[no-untyped-call]
            gathered = self.all_gather(data.ljust(_SHARED_BYTES, b"\0"))
            shared = [pickle.loads(one) for one in gathered]
            if others := [rank for rank, (its, _) in enumerate(shared) if its != uuid]:
                raise CommError(
                    f"rank {self.rank} and rank {others[0]} are on different GPUs: backend ipc is for ranks that share "
                    "one. Use backend auto."
                )
            views = [
                own if rank == self.rank else make(*given) for rank, (_, (make, given)) in enumerate(shared)
            ]
        except CommError:
            raise
        except RuntimeError as error:
            raise CommError(
                f"rank {self.rank} cannot share GPU memory with the others ({error}). Use backend gloo."
            ) from error
        self.all_gather(b"\0")  # nobody writes before all have mapped it
        return _SharedMemory(self.rank, views, largest)


class _SharedMemory:
    """The memory of all ranks: first counts, int32, then boxes of a header and a payload of up to `largest` bytes."""

    def __init__(self, rank: int, views: list[Tensor], largest: int) -> None:
        self.rank, self.largest, self._views = rank, largest, views
        self.boxes = _boxes(largest)
        self.numbers: Counter[Channel] = Counter()
        """by channel, how many messages have been issued at this end"""

    @classmethod
    def size(cls, world_size: int, largest: int) -> int:
        boxes = (world_size - 1) * len(COMMUNICATORS) * _boxes(largest)
        return _rounded(8 * world_size * len(COMMUNICATORS)) + boxes * (_ALIGNED + _rounded(largest))

    def taken(self, channel: Channel) -> int:
        """The address of the count of messages that the receiver has taken, in the sender's memory."""
        return self._count(channel.source, channel.target, channel, 0)

    def sent(self, channel: Channel) -> int:
        """The address of the count of messages that have been sent, in the receiver's memory."""
        return self._count(channel.target, channel.source, channel, 1)

    def box(self, channel: Channel, message: int) -> tuple[Tensor, Tensor]:
        """The box of the channel's nth message in the receiver's memory: the header's part and the payload's, uint8."""
        world_size = len(self._views)
        sender = channel.source - (channel.source > channel.target)  # none has boxes for itself
        number = COMMUNICATORS.index(channel.communicator) * (world_size - 1) + sender
        number = number * self.boxes + message % self.boxes
        start = _rounded(8 * world_size * len(COMMUNICATORS))
        start += number * (_ALIGNED + _rounded(self.largest))
        memory = self._views[channel.target][start:]
        return memory[:HEADER_BYTES], memory[_ALIGNED : _ALIGNED + self.largest]

    def release(self) -> None:
        """Let whatever waits in this rank's streams for a peer go on."""
        own = self._views[self.rank]
        counts = own[: 8 * len(self._views) * len(COMMUNICATORS)].view(torch.int32)
        side = torch.cuda.Stream(own.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            counts.fill_(_RELEASED)
        side.synchronize()

    def _count(self, where: int, peer: int, channel: Channel, kind: int) -> int:
        world_size = len(self._views)
        number = (2 * COMMUNICATORS.index(channel.communicator) + kind) * world_size + peer
        return self._views[where].data_ptr() + 4 * number


class IpcStreams(CudaStreams):
    """CUDA streams whose messages are copied within the GPU."""

    def __init__(self, rank: int, device: torch.device, memory: _SharedMemory) -> None:
        super().__init__(rank, device)
        self._memory = memory

    def _put(self, channel: Channel, header: HeaderToSend, payload: Tensor, met: torch.cuda.Event) -> None:
        memory, number = self._memory, self._next(channel)
        if number > memory.boxes:
            _wait(memory.taken(channel), number - memory.boxes)
        met.record()
        into_header, into_payload = memory.box(channel, number)
        header.write(into_header)
        into_payload[: len(payload)].copy_(payload, non_blocking=True)
        _write(memory.sent(channel), number)

    def _take(self, channel: Channel, header: Tensor, payload: Tensor, met: torch.cuda.Event) -> None:
        memory, number = self._memory, self._next(channel)
        _wait(memory.sent(channel), number)
        met.record()
        came_header, came_payload = memory.box(channel, number)
        header.copy_(came_header, non_blocking=True)
        payload.copy_(came_payload[: len(payload)], non_blocking=True)
        _write(memory.taken(channel), number)

    def _next(self, channel: Channel) -> int:
        self._memory.numbers[channel] += 1
        return self._memory.numbers[channel]


def _boxes(largest: int) -> int:
    """How many boxes a channel has."""
    return max(FEWEST, min(MOST, BOXES_BYTES // (_ALIGNED + _rounded(largest))))


def _rounded(size: int) -> int:
    """The next multiple of _ALIGNED."""
    return -(-size // _ALIGNED) * _ALIGNED


# torch has no call for these two of CUDA's driver.


def _wait(address: int, number: int) -> None:
    """Let the current stream wait until the int32 there is at least `number`."""
    _call("cuStreamWaitValue32", address, number)


def _write(address: int, number: int) -> None:
    """Let the current stream write the int32 there, after all that it has written before."""
    _call("cuStreamWriteValue32", address, number)


def _call(name: str, address: int, number: int) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    # flags 0: a wait for "at least", a write that earlier writes are seen before
    if status := _driver()[name](stream, address, number, 0):
        raise CommError(f"{name} failed with CUDA error {status}")


@cache
def _driver() -> dict[str, Any]:
    """CUDA's calls by name. Raises OSError or AttributeError where there are none."""
    library, calls = ctypes.CDLL("libcuda.so.1"), {}
    for name in ("cuStreamWaitValue32", "cuStreamWriteValue32"):
        # Since CUDA 11.7 the second version is the one that needs no switch in the kernel module.
        call = library[f"{name}_v2"]
        call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        calls[name] = call
    return calls

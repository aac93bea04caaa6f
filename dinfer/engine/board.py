"""Board: where a rank stands, in memory that another process can read.

Lanes write their positions here as they move (a fraction of a microsecond); the watcher beside the rank reads
them, also while this process cannot say anything: busy in C code, stopped, or killed. No torch here: the
watcher imports it.
"""

import mmap
import os
import tempfile

from dinfer.messages import DeviceMemory as DeviceMemory
from dinfer.messages import Phase as Phase
from dinfer.messages import Stand as Stand

MAX_LANES = 254  # with the recorder's lane for decode, what one byte of an event can name

_MEMORY = MAX_LANES + 1
"""the first of the words for device memory"""

BOARD_BYTES = 8 * (_MEMORY + 3)

PHASES: tuple[Phase, ...] = ("starting", "loading", "prefill", "decode", "done")


class Board:
    """One rank's memory, which may be shared: the writer and each reader wrap it in a Board.

    What belongs together is one 64-bit word, written by one store: a reader never sees half of it. (struct.pack_into
    would not do: it zeroes the bytes first.) Word 0 holds phase and tokens decoded, word n + 1 lane n, and the last
    three device memory.
    """

    def __init__(self, memory: memoryview | None = None) -> None:
        shared = memoryview(bytearray(BOARD_BYTES)) if memory is None else memory[:BOARD_BYTES]
        self._words = shared.cast("q")

    def set_phase(self, phase: Phase, decoded: int = 0) -> None:
        self._words[0] = decoded << 8 | PHASES.index(phase)

    def set_lane(self, lane: int, position: int, limit: int, *, started: bool) -> None:
        self._words[lane + 1] = limit << 32 | position << 1 | started

    def set_device_memory(self, memory: DeviceMemory | None) -> None:
        for n, count in enumerate(memory or (0, 0, 0)):
            self._words[_MEMORY + n] = count

    @property
    def device_memory(self) -> DeviceMemory | None:
        """None for a rank that has no GPU."""
        found = DeviceMemory(*self._words[_MEMORY:].tolist())
        return found if found.total else None

    @property
    def phase(self) -> Phase:
        return PHASES[self._words[0] & 0xFF]

    @property
    def decoded(self) -> int:
        return self._words[0] >> 8

    def stand(self, lanes: int) -> Stand:
        words = self._words[1 : lanes + 1].tolist()
        return Stand(
            positions=tuple((word & 0xFFFFFFFF) >> 1 for word in words),
            started=tuple(bool(word & 1) for word in words),
            limits=tuple(word >> 32 for word in words),
        )


def anonymous_file(size: int) -> int:
    """A file descriptor of `size` bytes without a name: gone with the last process that holds it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("dinfer")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def map_file(descriptor: int, size: int) -> memoryview:
    """The file's bytes, shared with every other process that maps it."""
    return memoryview(mmap.mmap(descriptor, size))

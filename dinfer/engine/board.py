"""Board: a rank's positions in memory that another process can read.

Lanes write their positions here as they move. The watcher process beside the rank reads them even while the rank's own
process is busy in C code, stopped or killed. It imports this module, which therefore must not import torch.
"""

import mmap
import os
import tempfile

from dinfer.messages import DeviceMemory as DeviceMemory
from dinfer.messages import Phase as Phase
from dinfer.messages import Stand as Stand

MAX_LANES = 254  # and the recorder's lane for decode: an event names its lane in one byte

_MEMORY = MAX_LANES + 1
"""the first of the three words of device memory"""

_SESSION = _MEMORY + 3

BOARD_BYTES = 8 * (_SESSION + 1)
SESSIONS = ("awaited", "there", "gone")
"""how the watcher finds the connection to the session: not made yet, made, closed"""

PHASES: tuple[Phase, ...] = ("starting", "loading", "measuring", "prefill", "decode", "done")


class Board:
    """One rank's board over `memory` of BOARD_BYTES bytes, which processes may share; each wraps it in a Board.

    A lane's values share one 64-bit word that is written by one store, so a reader never sees half an update.
    (struct.pack_into zeroes the bytes first and would not do.) Word 0 holds phase and decoded tokens, word n + 1 lane
    n, the next three device memory, and the last, which the watcher writes, whether the session is there.
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
        """None for a rank without a GPU."""
        found = DeviceMemory(*self._words[_MEMORY:_SESSION].tolist())
        return found if found.total else None

    def set_session(self, session: str) -> None:
        """One of SESSIONS."""
        self._words[_SESSION] = SESSIONS.index(session)

    @property
    def session(self) -> str:
        return SESSIONS[self._words[_SESSION]]

    @property
    def phase(self) -> Phase:
        return PHASES[self._words[0] & 0xFF]

    @property
    def decoded(self) -> int:
        """How many new tokens the rank has decoded."""
        return self._words[0] >> 8

    def stand(self, lanes: int) -> Stand:
        """Where the first `lanes` lanes stand."""
        words = self._words[1 : lanes + 1].tolist()
        return Stand(
            positions=tuple((word & 0xFFFFFFFF) >> 1 for word in words),
            started=tuple(bool(word & 1) for word in words),
            limits=tuple(word >> 32 for word in words),
        )


def anonymous_file(size: int) -> int:
    """The descriptor of an unnamed file of `size` bytes, which goes with the last process that holds it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("dinfer")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def map_file(descriptor: int, size: int) -> memoryview:
    """The file's bytes, shared between all processes that map it."""
    return memoryview(mmap.mmap(descriptor, size))

"""Board: where a rank stands, in memory that another process can read.

Lanes write their positions here as they move (a fraction of a microsecond); the watcher beside the rank reads
them, also while this process cannot say anything: busy in C code, stopped, or killed. No torch here: the
watcher imports it.
"""

import mmap
import os
import struct
import tempfile
from dataclasses import dataclass
from typing import Literal

MAX_LANES = 340
_SLOT = struct.Struct("<qqq")  # position, started, limit
_HEAD = struct.Struct("<qq")  # phase, tokens decoded
BOARD_BYTES = 8192

Phase = Literal["starting", "loading", "prefill", "decode", "done"]
PHASES: tuple[Phase, ...] = ("starting", "loading", "prefill", "decode", "done")


@dataclass(frozen=True)
class Stand:
    """Where one rank stands, by lane: ops that have ended, whether the next has begun, how far it may go."""

    positions: tuple[int, ...]
    started: tuple[bool, ...]
    limits: tuple[int, ...]

    @property
    def at_limits(self) -> bool:
        return self.positions == self.limits


class Board:
    """One rank's memory, which may be shared: the writer and each reader wrap it in a Board."""

    def __init__(self, memory: memoryview | None = None) -> None:
        self._memory = memoryview(bytearray(BOARD_BYTES)) if memory is None else memory[:BOARD_BYTES]

    def set_phase(self, phase: Phase, decoded: int = 0) -> None:
        _HEAD.pack_into(self._memory, 0, PHASES.index(phase), decoded)

    def set_lane(self, lane: int, position: int, limit: int, *, started: bool) -> None:
        _SLOT.pack_into(self._memory, (lane + 1) * _SLOT.size, position, started, limit)

    @property
    def phase(self) -> Phase:
        number: int = _HEAD.unpack_from(self._memory, 0)[0]
        return PHASES[number]

    @property
    def decoded(self) -> int:
        return int(_HEAD.unpack_from(self._memory, 0)[1])

    def stand(self, lanes: int) -> Stand:
        rows = [self._lane(number) for number in range(lanes)]
        return Stand(
            tuple(row[0] for row in rows), tuple(bool(row[1]) for row in rows), tuple(row[2] for row in rows)
        )

    def _lane(self, number: int) -> tuple[int, int, int]:
        position, started, limit = _SLOT.unpack_from(self._memory, (number + 1) * _SLOT.size)
        return position, started, limit


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

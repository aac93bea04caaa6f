"""Whether a process wants the CPU, even if it gets almost none.

On an overloaded machine CPU time alone cannot tell a process that computes from one that is stuck. This reads thread
states from /proc (Linux): psutil gives the state of a process, but only CPU times of its threads.
"""

import os
from contextlib import suppress

LOOKS = 8

_WINDOW = (1 << LOOKS) - 1


class Wanting:
    """Samples the threads of one process.

    It is one and the same thread that must be runnable: on such a machine any thread that wakes for a moment waits for
    its turn.
    """

    def __init__(self, pid: int) -> None:
        self._tasks = f"/proc/{pid}/task"
        self._ready: dict[str, int] = {}
        """By thread, a bit for each of the last samples, the newest lowest: whether it was runnable."""

    def look(self) -> float:
        """Take a sample. Largest share of the last samples in which one thread was runnable; 0 if unknown."""
        before, self._ready = self._ready, {}
        with suppress(OSError):  # it is gone, or this system has no such files
            for thread in os.listdir(self._tasks):
                ready = self._state(thread) == "R"
                self._ready[thread] = (before.get(thread, 0) << 1 | ready) & _WINDOW
        return max((bits.bit_count() for bits in self._ready.values()), default=0) / LOOKS

    def _state(self, thread: str) -> str:
        """Its state letter; "" once it has ended."""
        with (
            suppress(OSError),
            open(f"{self._tasks}/{thread}/stat", encoding="ascii", errors="replace") as file,
        ):
            return file.read().rpartition(")")[2].split(None, 1)[0]
        return ""

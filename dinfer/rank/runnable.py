"""Wanting: whether a process wants the CPU, also where it gets next to none: on a machine that does too much else, CPU
time alone does not tell one that computes from one that is stuck.
"""

import os
from contextlib import suppress

LOOKS = 8

_WINDOW = (1 << LOOKS) - 1


class Wanting:
    """One process's threads, to be looked at now and then (Linux).

    One thread must have been ready to run all along: on such a machine any that wakes for a moment waits for its turn.
    """

    def __init__(self, pid: int) -> None:
        self._tasks = f"/proc/{pid}/task"
        self._ready: dict[str, int] = {}
        """by thread, a bit for each of the last looks, the newest lowest: whether it ran, or could have"""

    def look(self) -> float:
        """At how many of the last looks one and the same thread was ready to run, of 1; 0 where there is no telling."""
        before, self._ready = self._ready, {}
        with suppress(OSError):  # it is gone, or this system has no such files
            for thread in os.listdir(self._tasks):
                ready = self._state(thread) == "R"
                self._ready[thread] = (before.get(thread, 0) << 1 | ready) & _WINDOW
        return max((bits.bit_count() for bits in self._ready.values()), default=0) / LOOKS

    def _state(self, thread: str) -> str:
        """Its letter; "" of one that has ended since."""
        with (
            suppress(OSError),
            open(f"{self._tasks}/{thread}/stat", encoding="ascii", errors="replace") as file,
        ):
            return file.read().rpartition(")")[2].split(None, 1)[0]
        return ""

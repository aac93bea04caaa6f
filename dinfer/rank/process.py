"""What the system knows of a process: its state, CPU time and memory, and whether its threads want the CPU.

The watcher imports this, so it must stay light: no torch.
"""

import os
import socket
from collections import deque
from contextlib import suppress
from functools import cache
from math import inf
from pathlib import Path
from time import monotonic, time
from typing import NamedTuple

import psutil

_LETTERS = {
    psutil.STATUS_RUNNING: "R",
    psutil.STATUS_SLEEPING: "S",
    psutil.STATUS_DISK_SLEEP: "D",
    psutil.STATUS_STOPPED: "T",
    psutil.STATUS_TRACING_STOP: "t",
    psutil.STATUS_ZOMBIE: "Z",
    psutil.STATUS_DEAD: "X",
}


@cache
def clock_name() -> str:
    """Processes with the same name here have one monotonic clock: those of one boot of a machine, unless a container
    has a clock of its own."""
    name = socket.gethostname()
    with suppress(OSError):
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with suppress(OSError):
        name += f" {os.readlink('/proc/self/ns/time')}"
    return name


class Life(NamedTuple):
    """A process's state letter (as `ps` shows it), CPU seconds and bytes in memory."""

    state: str
    cpu_s: float
    memory: int


def sign_of_life(pid: int) -> Life | None:
    """None for a process that there is not, or that may not be asked."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            state = _LETTERS.get(process.status(), "S")
            return Life(state, times.user + times.system, process.memory_info().rss)
    except psutil.Error:
        return None


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped that process."""
    life = sign_of_life(pid)
    return life is not None and life.state in ("T", "t")


def age(pid: int) -> float:
    """For how many seconds that process has run; infinite for one that there is not, or that may not be asked."""
    try:
        return time() - psutil.Process(pid).create_time()
    except psutil.Error:
        return inf


def exists(pid: int) -> bool:
    """Whether that process runs; one that has ended and that nobody has waited for does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


LOOKS = 8

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Wanting:
    """Tells whether a process wants the CPU, even if it gets almost none: samples the states of its threads.

    On an overloaded machine CPU time alone cannot tell a process that computes from one that is stuck. States come from
    /proc (Linux): psutil gives the state of a process, but only CPU times of its threads. It is one and the same thread
    that must be runnable: on such a machine any thread that wakes for a moment waits for its turn.
    """

    def __init__(self, pid: int) -> None:
        self._tasks = f"/proc/{pid}/task"
        self._ready: dict[str, deque[bool]] = {}
        """by thread: whether it was runnable in each of the last samples"""
        self._used: dict[str, deque[float]] = {}
        """by thread: its CPU seconds then"""
        self._times: deque[float] = deque(maxlen=LOOKS)

    @property
    def busiest(self) -> float | None:
        """The largest share of a core that one thread has used since the first of the last LOOKS samples; None where
        there are not so many yet. Many threads that wait for the GIL use some CPU time together, but none alone."""
        if len(self._times) < LOOKS or not self._used:
            return None
        used = (times[-1] - times[0] for times in self._used.values())
        return max(used) / (self._times[-1] - self._times[0])

    def look(self) -> float:
        """Take a sample. Largest share of the last samples in which one thread was runnable; 0 if unknown."""
        before, self._ready = self._ready, {}
        used, self._used = self._used, {}
        self._times.append(monotonic())
        with suppress(OSError):  # it is gone, or this system has no such files
            for thread in os.listdir(self._tasks):
                with (
                    suppress(OSError),
                    open(f"{self._tasks}/{thread}/stat", "rb") as file,
                ):  # it may end meanwhile
                    state, *others = file.read().rpartition(b")")[2].split(None, 13)
                    samples = self._ready[thread] = before.get(thread) or deque(maxlen=LOOKS)
                    samples.append(state == b"R")
                    times = self._used[thread] = used.get(thread) or deque(maxlen=LOOKS)
                    times.append((int(others[10]) + int(others[11])) / TICKS)  # utime and stime, see proc(5)
        return max(map(sum, self._ready.values()), default=0) / LOOKS

"""How a process is: its state, CPU time and memory, as the system tells it."""

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


def exists(pid: int) -> bool:
    """Whether that process runs; one that has ended and that nobody has waited for does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True

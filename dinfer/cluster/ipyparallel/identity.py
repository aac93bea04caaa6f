"""Which process, on which machine: known again later, even where its process id has been given to another."""

import os
import socket
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Self

ProcessState = Literal["alive", "gone", "elsewhere"]

_START_TIME = 19
"""place in /proc/PID/stat, counted from the state, which follows the command: clock ticks since the machine started"""


@dataclass(frozen=True)
class Identity:
    """One process. Its start is counted on a clock that nobody can set, so that a wrong date changes nothing."""

    pid: int
    started: str
    host: str
    boot: str
    """which start of the machine; "" where the system does not say"""
    space: str
    """which process ids: a container has its own"""

    @classmethod
    def of(cls, pid: int) -> Self:
        """A process of this machine. Raises ProcessLookupError where there is none."""
        started = _start_of(pid)
        if started is None:
            raise ProcessLookupError(f"there is no process {pid}")
        return cls(pid, started, socket.gethostname(), _boot(), _space())

    @property
    def is_here(self) -> bool:
        """Whether this process can see that one."""
        return (self.host, self.boot, self.space) == (socket.gethostname(), _boot(), _space())

    def state(self) -> ProcessState:
        """`elsewhere`: cannot be known from here. After a restart of the machine all of its processes are gone."""
        if self.host != socket.gethostname():
            return "elsewhere"
        if self.boot != _boot():
            return "gone"
        if self.space != _space():
            return "elsewhere"
        return "alive" if _start_of(self.pid) == self.started else "gone"


def runs(pid: int) -> bool:
    """Whether a process of that id runs on this machine."""
    return _start_of(pid) is not None


def _start_of(pid: int) -> str | None:
    """When a process started; None where there is none, or one that nobody has waited for."""
    return _start_by_proc(pid) if sys.platform == "linux" else _start_by_psutil(pid)


def _start_by_proc(pid: int) -> str | None:
    try:
        # Many times a second: without a Path.
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            text = file.read()
    except OSError:
        return None
    words = text.rpartition(")")[2].split()
    return None if words[0] in "ZX" else words[_START_TIME]


def _start_by_psutil(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.Error:
        return None


@cache  # the same as long as this process runs
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""

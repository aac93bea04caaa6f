"""Identifies a process on a machine, also after its process id has been given to another.

psutil alone does not do: its start times depend on the wall clock, and it knows neither boots nor containers.
"""

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
    """One process. `started` is counted on a clock that cannot be set, so that a changed date makes no difference."""

    pid: int
    started: str
    host: str
    boot: str
    """the boot of the machine; "" if unknown"""
    space: str
    """the namespace of process ids: each container has its own"""

    @classmethod
    def of(cls, pid: int) -> Self:
        """A process of this machine. Raises ProcessLookupError if there is none."""
        started = _start_of(pid)
        if started is None:
            raise ProcessLookupError(f"there is no process {pid}")
        return cls(pid, started, socket.gethostname(), _boot(), _space())

    @property
    def is_here(self) -> bool:
        """Whether this process can see it."""
        return (self.host, self.boot, self.space) == (socket.gethostname(), _boot(), _space())

    def state(self) -> ProcessState:
        """`elsewhere`: unknown, since it cannot be seen from here. A reboot ends all processes of a machine."""
        if self.host != socket.gethostname():
            return "elsewhere"
        if self.boot != _boot():
            return "gone"
        if self.space != _space():
            return "elsewhere"
        return "alive" if _start_of(self.pid) == self.started else "gone"


def runs(pid: int) -> bool:
    """Whether a process with that id runs on this machine."""
    return _start_of(pid) is not None


def _start_of(pid: int) -> str | None:
    """When a process started; None for no process, or a zombie."""
    return _start_by_proc(pid) if sys.platform == "linux" else _start_by_psutil(pid)


def _start_by_proc(pid: int) -> str | None:
    try:
        # Without Path, since this runs many times a second.
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

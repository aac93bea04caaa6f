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
        return cls(pid, started, socket.gethostname(), boot_id(), namespace("pid"))

    @property
    def is_here(self) -> bool:
        """Whether this process can see it."""
        return (self.host, self.boot, self.space) == (socket.gethostname(), boot_id(), namespace("pid"))

    def state(self) -> ProcessState:
        """`elsewhere`: unknown, since it cannot be seen from here. A reboot ends all processes of a machine."""
        if self.host != socket.gethostname():
            return "elsewhere"
        if self.boot != boot_id():
            return "gone"
        if self.space != namespace("pid"):
            return "elsewhere"
        return "alive" if _start_of(self.pid) == self.started else "gone"


def _start_of(pid: int) -> str | None:
    """When a process started; None for no process, or a zombie."""
    if sys.platform != "linux":
        import psutil

        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
        except psutil.Error:
            return None
    try:
        # Without Path, since this runs many times a second.
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            state, *words = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else words[18]  # clock ticks since the machine started


@cache  # the same as long as this process runs
def boot_id() -> str:
    """This boot of the machine; "" if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def namespace(kind: str) -> str:
    """This process's namespace of that kind, such as pid or net; "" if unknown."""
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return ""

"""One folder that watched processes write to: what is in it, and how its processes are asked and looked at."""

import os
import socket
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path

from dinfer.watch.probe.reading import Reader, ask_stacks
from dinfer.watch.probe.records import WatchedProcess
from dinfer.watch.probe.stacks import DUMP_SIGNALS
from dinfer.watching.signs import ProcessPulse, pulse_of


class Folder(ABC):
    """`broken`: by the name of a process, why its files could not be read by the last `read`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = Reader(path)

    def read(self) -> list[WatchedProcess]:
        """All processes that can be read. Raises RecordsError where the folder cannot be."""
        return self._reader.read_all()

    @property
    def broken(self) -> dict[str, str]:
        return self._reader.broken

    def note(self) -> str:
        """What else to know of the folder; "" for nothing."""
        return ""

    @abstractmethod
    def pulse_of(self, process: WatchedProcess) -> ProcessPulse:
        """How the process lives, from now on."""

    @abstractmethod
    def ask_stacks(self, process: WatchedProcess) -> None:
        """Have the process write where its threads stand, for a later look. Raises RecordsError."""

    @abstractmethod
    def dump(self, process: WatchedProcess) -> bool:
        """Have C code write that, where Python does not answer. Whether the process was asked."""


class FolderHere(Folder):
    """Of this host's processes. Those of others in it, as in a copied record, cannot be asked."""

    def pulse_of(self, process: WatchedProcess) -> ProcessPulse:
        return pulse_of(process)

    def ask_stacks(self, process: WatchedProcess) -> None:
        ask_stacks(self.path, process)

    def dump(self, process: WatchedProcess) -> bool:
        if not _takes_dumps(process):
            return False
        with suppress(OSError):
            os.kill(process.pid, process.dump or 0)
        return True


def _takes_dumps(process: WatchedProcess) -> bool:
    """Whether the process of that number, on this host, is still one that takes the signal: any other would end."""
    number = process.dump
    if number not in DUMP_SIGNALS or process.host != socket.gethostname() or process.pid <= 1:
        return False
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)

"""Looks at the folders that watched processes write to, again and again, and asks the processes where they stand."""

import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dinfer.verdict.signs import Signs, StackFrame
from dinfer.watch.probe.reading import Reader, ask_stacks
from dinfer.watch.probe.records import RecordsError, WatchedProcess
from dinfer.watch.probe.rows import RowsTaken, read_rows
from dinfer.watch.probe.stacks import DUMP_SIGNAL
from dinfer.watching.events import ranks_of, trace_of
from dinfer.watching.evidence import Evidence
from dinfer.watching.failures import told_apart
from dinfer.watching.signs import MAIN, ProcessPulse, dumped_frame, pulse_of, signs_of

MOST_DUMPED = 1 << 18
"""characters of a dump of stacks that are read, the last"""


class Watched:
    """Folders of watched processes, looked at again and again. `clock`: seconds, for tests."""

    def __init__(self, folders: Iterable[str | Path], command: Sequence[str] = ()) -> None:
        self._readers = {Path(folder): Reader(folder) for folder in folders}
        self._command = command
        self._pulses: dict[tuple[Path, str], ProcessPulse] = {}
        self._asked: dict[tuple[Path, str], float] = {}
        self._places: dict[int, tuple[Path, WatchedProcess]] = {}
        self._mute: set[int] = set()
        self._dumped: set[tuple[Path, str]] = set()
        self.unreadable: list[str] = []

    def look(self, *, live: bool = True) -> Evidence:
        """What is known now. `live`: the processes may be asked, as they are of this host; else the record is all."""
        processes: list[WatchedProcess] = []
        self.unreadable = []
        owners: dict[int, tuple[Path, str]] = {}
        for folder, reader in self._readers.items():
            try:
                for process in reader.read():
                    processes.append(process)
                    owners[id(process)] = (folder, process.name)
            except RecordsError as error:
                self.unreadable.append(str(error))
        ranks = ranks_of(processes)
        now, now_ns = time.monotonic(), time.time_ns() if live else None
        signs = {}
        for rank, process in ranks.items():
            key = owners[id(process)]
            pulse = self._pulse(key, process, now)
            signs[rank] = signs_of(process, pulse, now, now_ns)
            self._places[rank] = (key[0], process)
        trace = trace_of(ranks, self._command)
        signs = {rank: _fresh(its, ranks[rank]) for rank, its in signs.items()}
        self._mute = {rank for rank, its in signs.items() if its.answers is False}
        for rank in self._mute:
            folder, process = self._places[rank]
            if (folder, process.name) in self._dumped and (frame := self._dump_frame(folder, process)):
                signs[rank] = replace(signs[rank], frames={MAIN: frame})
        return Evidence(trace, told_apart(signs, ranks, self._gone(ranks, owners)), now_ns, ranks)

    def _pulse(self, key: tuple[Path, str], process: WatchedProcess, now: float) -> ProcessPulse:
        if key not in self._pulses:
            self._pulses[key] = pulse_of(process)
        pulse = self._pulses[key]
        pulse.look(now)
        return pulse

    def _gone(
        self, ranks: Mapping[int, WatchedProcess], owners: Mapping[int, tuple[Path, str]]
    ) -> dict[int, float]:
        """When each rank's process was seen to be gone, if it is."""
        found = {rank: self._pulses[owners[id(process)]].gone for rank, process in ranks.items()}
        return {rank: at for rank, at in found.items() if at is not None}

    def rows(self) -> dict[int, list[RowsTaken]]:
        """By rank, the digests of rows that its process has taken so far."""
        found = {}
        for rank, (folder, process) in self._places.items():
            try:
                found[rank] = read_rows(folder, process)
            except RecordsError as error:
                self.unreadable.append(str(error))
        return {rank: rows for rank, rows in found.items() if rows}

    def ask(self, ranks: Iterable[int]) -> None:
        """Have these ranks write where their threads stand, for a later look; each at most twice a second."""
        now = time.monotonic()
        for rank in ranks:
            folder, process = self._places[rank]
            key = (folder, process.name)
            if now - self._asked.get(key, -1.0) >= 0.5:
                self._asked[key] = now
                with suppress(RecordsError):  # it is just ending
                    ask_stacks(folder, process)
                if rank in self._mute and key not in self._dumped and _takes_dumps(process):
                    self._dumped.add(key)  # Python does not answer; C code does, on a signal
                    with suppress(OSError):
                        os.kill(process.pid, process.dump or 0)

    def _dump_frame(self, folder: Path, process: WatchedProcess) -> StackFrame | None:
        try:
            text = (folder / f"{process.name}.dump").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        return dumped_frame(text[-MOST_DUMPED:])


def _takes_dumps(process: WatchedProcess) -> bool:
    """Whether the process of that number, on this host, is still one that takes the signal: any other would end."""
    if (
        DUMP_SIGNAL is None
        or process.dump != DUMP_SIGNAL
        or process.host != socket.gethostname()
        or process.pid <= 1
    ):
        return False
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (DUMP_SIGNAL - 1) & 1)


def _fresh(signs: Signs, process: WatchedProcess) -> Signs:
    """Without stacks that are older than the rank's last op."""
    last = max((max(op.issued_ns, op.done_ns) for op in process.ops[-50:]), default=0)
    if not process.stacks or process.stacks[-1].at_ns < last:
        return replace(signs, frames={})
    return signs

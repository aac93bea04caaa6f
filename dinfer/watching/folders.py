"""Looks at the folders that watched processes write to, again and again, and asks the processes where they stand."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from dinfer.verdict.recorded_waits import UNREAD
from dinfer.verdict.signs import Signs, StackFrame
from dinfer.watch.probe.records import RecordsError, WatchedProcess
from dinfer.watch.probe.rows import RowsReader, RowsTaken, each_rows
from dinfer.watching.clocks import on_one_clock
from dinfer.watching.events import ranks_of, trace_of
from dinfer.watching.evidence import Evidence
from dinfer.watching.failures import only_first_failures
from dinfer.watching.folder import Folder, FolderHere
from dinfer.watching.held_rows import Layers, LayersSeen
from dinfer.watching.jobs import WatchedJob, jobs_of
from dinfer.watching.kv import WatchedKv
from dinfer.watching.signs import MAIN, ProcessPulse, dumped_frame, signs_of

T = TypeVar("T")

RECORDS = "records"
"""in the folder of a command that a notebook watches: where its processes write"""

MOST_DUMPED = 1 << 18
"""characters of a dump of stacks that are read, the last"""


RECENT = 500
"""ops of a process that a look at what happens now needs"""

ASKED_S, SELDOM_S = 0.5, 60.0
"""seconds between two questions to one process: the least, and the most"""


ROWS_A_LOOK = 1 << 18
"""bytes of a process's rows that a look reads, so that little is left to read at the end"""

GIVE_WAY_S = 0.001
"""A lock is not fair: whoever waits for it gets it while the one who takes it again and again sleeps."""


class ProcessKey(NamedTuple):
    """What tells a process from all others that are looked at."""

    host: str
    pid: int
    name: str


def _key(process: WatchedProcess) -> ProcessKey:
    return ProcessKey(process.host, process.pid, process.name)


class Watched:
    """Folders of watched processes, looked at again and again. `one_job`: all processes are ranks of one world."""

    def __init__(
        self, folders: Iterable[str | Path], command: Sequence[str] = (), *, one_job: bool = False
    ) -> None:
        self._given: list[Folder] = [FolderHere(Path(folder)) for folder in folders]
        self._command, self._one_job = command, one_job
        self._folders: dict[ProcessKey, Folder] = {}
        """where the files of each process are"""
        self._pulses: dict[ProcessKey, ProcessPulse] = {}
        self._asked: dict[ProcessKey, tuple[float, int, int]] = {}
        self._mute: set[ProcessKey] = set()
        self._dumped: set[ProcessKey] = set()
        self._seen: dict[ProcessKey, int] = {}
        self.unreadable: list[str] = []
        self._troubles: dict[str, None] = {}
        self._rows_seen: dict[ProcessKey, tuple[RowsReader, LayersSeen]] = {}
        self._reading_rows = threading.Lock()  # held for no longer than a look reads
        self._layers_read: dict[ProcessKey, tuple[int, Layers]] = {}
        """by how much had been read"""
        self._kv_read: tuple[object, WatchedKv] = (None, WatchedKv())

    def add(self, folder: Folder) -> None:
        """Look at this folder, too. No error where that is done already."""
        if folder not in self._given:
            self._given.append(folder)

    def trouble(self, error: Exception) -> None:
        """A look has failed: later ones note it."""
        self._troubles[f"looks fail: {type(error).__name__}: {error}"] = None

    def look(self, *, live: bool = True, recent: bool = False) -> list[Evidence]:
        """What is known now: of each job, the oldest first; at least one, which may be empty. `live`: the processes may
        be asked, as they are of this host; else the record is all. `recent`: of long records only the last ops and the
        open ones, which a verdict needs; so that a look takes as long however long the run is."""
        self._seen = self._sizes()
        processes, unread, unknown = self._read()
        if recent:
            for process in processes:
                with suppress(RecordsError):  # whoever asks for the rows is told
                    self._read_rows(process)
            processes = [shortened(process) for process in processes]
        now, now_ns = time.monotonic(), time.time_ns() if live else None
        for process in processes:
            self._pulse(process).look(now)
        if self._one_job:
            jobs = [WatchedJob("", "", ranks_of(processes))]
        else:
            jobs = jobs_of(processes, self._is_over) or [WatchedJob("", "", {})]
        self._mute = set()
        looked = []
        for job in jobs:
            ranks, skewed = on_one_clock(job.ranks.values())
            notes = (*self.unreadable, *self._troubles, *skewed)
            job = replace(job, ranks=dict(zip(job.ranks, ranks, strict=True)))
            looked.append(self._of_job(job, unread, unknown, notes, now, now_ns))
        return looked

    def _read(self) -> tuple[list[WatchedProcess], set[ProcessKey], bool]:
        """All processes; which of them are those whose ops could not be read; whether of some nothing could."""
        found: list[WatchedProcess] = []
        unread, unknown = set[ProcessKey](), False
        self.unreadable = []
        begun: dict[ProcessKey, int] = {}
        for folder in self._given:
            try:
                processes = folder.read()
            except RecordsError as error:
                self.unreadable.append(str(error))
                continue
            broken = folder.broken
            self.unreadable += [*broken.values(), *filter(None, [folder.note()])]
            known = {process.name for process in processes}
            unknown = unknown or not broken.keys() <= known
            for process in processes:
                key = _key(process)
                if key in begun:  # one folder, and a copy of it
                    if process.started_ns != begun[key]:
                        self.unreadable.append(
                            f"{folder.path / process.name} is of another process than that of the same name in "
                            f"{self._folders[key].path}, and left out: explain it by itself"
                        )
                    continue
                begun[key] = process.started_ns
                found.append(process)
                self._folders[key] = folder
                if process.name in broken:
                    unread.add(key)
        return found, unread, unknown

    def _of_job(
        self,
        job: WatchedJob,
        unread: set[ProcessKey],
        unknown: bool,
        notes: tuple[str, ...],
        now: float,
        now_ns: int | None,
    ) -> Evidence:
        ranks = job.ranks
        signs = {
            rank: _without_old_stacks(signs_of(one, self._pulse(one), now, now_ns), one)
            for rank, one in ranks.items()
        }
        for rank, process in ranks.items():
            if _key(process) in unread:
                signs[rank] = Signs(phase=UNREAD)
            if signs[rank].answers is False:
                self._mute.add(_key(process))
                if _key(process) in self._dumped and (frame := self._dump_frame(process)):
                    signs[rank] = replace(signs[rank], frames={MAIN: frame})
        if unknown:
            size = max((process.world_size or 0 for process in ranks.values()), default=0)
            signs |= {rank: Signs(phase=UNREAD) for rank in range(size) if rank not in ranks}
        gone = {rank: at for rank, one in ranks.items() if (at := self._pulse(one).gone) is not None}
        trace = trace_of(ranks, self._command)
        seen = {rank: self._pulse(one).seen_ns for rank, one in ranks.items()}
        told = only_first_failures(signs, ranks, gone, seen)
        return Evidence(trace, told, now_ns, ranks, job=job.name, key=job.key, notes=notes)

    def _pulse(self, process: WatchedProcess) -> ProcessPulse:
        key = _key(process)
        if key not in self._pulses:
            self._pulses[key] = self._folders[key].pulse_of(process)
        return self._pulses[key]

    def _is_over(self, process: WatchedProcess) -> bool:
        """Of a process of another host, its last sign of life says it."""
        pulse = self._pulse(process)
        return process.ended is not None or pulse.gone is not None or not pulse.is_followed

    def has_news(self) -> bool:
        """Whether, since the last look, a process has ended or written a line. Much cheaper than a look."""
        pulses = [self._pulses[key] for key in list(self._folders) if key in self._pulses]
        return any(pulse.has_gone() for pulse in pulses) or self._sizes() != self._seen

    def _sizes(self) -> dict[ProcessKey, int]:
        """Of the lines of each process."""
        found = {}
        for key, folder in list(self._folders.items()):
            with suppress(OSError):
                found[key] = (folder.path / f"{key.name}.jsonl").stat().st_size
        return found

    def living(self, patience_s: float) -> list[int]:
        """The numbers of the watched processes of this host that still run after so many seconds."""
        until = time.monotonic() + patience_s
        while found := [
            pulse.process.pid
            for pulse in self._pulses.values()
            if pulse.process and pulse.gone is None and not pulse.has_gone()
        ]:
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        return found

    def kv(self, found: Evidence) -> WatchedKv:
        """The rows of KV that the ranks have added so far, by their digests."""
        return WatchedKv(self._of_ranks(found, self._layers))

    def kv_so_far(self, found: Evidence) -> WatchedKv:
        """The same of the rows that have been read, and of no more than a look reads besides; the same object as long
        as no others come."""
        processes = {rank: _key(process) for rank, process in found.processes.items()}
        is_behind = False
        for process in found.processes.values():
            with suppress(RecordsError):  # whoever asks for the rows is told
                is_behind = self._read_rows(process) or is_behind
        held = {rank: self._held_of(key) for rank, key in processes.items()}
        state = (processes, {rank: read for rank, (read, _) in held.items()}, is_behind)
        before, kv = self._kv_read
        if before != state:
            kv = WatchedKv(
                {rank: layers for rank, (_, layers) in held.items() if layers}, is_behind=is_behind
            )
            self._kv_read = state, kv
        return kv

    def _held_of(self, key: ProcessKey) -> tuple[int, Layers]:
        """How many bytes of a process's rows have been read, and what these make."""
        with self._reading_rows:
            if key not in self._rows_seen:
                return 0, {}
            reader, seen = self._rows_seen[key]
            if self._layers_read.get(key, (-1, {}))[0] != reader.at:
                self._layers_read[key] = reader.at, seen.layers
            return self._layers_read[key]

    def rows(self, found: Evidence) -> dict[int, list[RowsTaken]]:
        """All that was taken of rows of KV and of tapped tensors so far, by rank. It may be much."""
        return self._of_ranks(found, lambda process: [*each_rows(self._folders[_key(process)].path, process)])

    def _of_ranks(self, found: Evidence, take: Callable[[WatchedProcess], T]) -> dict[int, T]:
        """What `take` makes of each rank's process, where that is anything."""
        made = {}
        for rank, process in found.processes.items():
            try:
                made[rank] = take(process)
            except RecordsError as error:
                self.unreadable.append(str(error))
        return {rank: one for rank, one in made.items() if one}

    def _layers(self, process: WatchedProcess) -> Layers:
        """What the process's rows make. Raises RecordsError."""
        while self._read_rows(process):
            time.sleep(GIVE_WAY_S)
        return self._held_of(_key(process))[1]

    def _read_rows(self, process: WatchedProcess) -> bool:
        """Read on in the process's rows, as much as a look does; whether there may be more. Raises RecordsError."""
        key = _key(process)
        with self._reading_rows:
            if key not in self._rows_seen:
                self._rows_seen[key] = RowsReader(self._folders[key].path, process.name), LayersSeen()
            reader, seen = self._rows_seen[key]
            begun = reader.at
            for one in reader.more(process, ROWS_A_LOOK, waits=True):
                seen.add(one)
            return reader.at - begun >= ROWS_A_LOOK

    def ask(self, processes: Iterable[WatchedProcess]) -> None:
        """Have these processes write where their threads stand, for a later look: each at most twice a second, and less
        often the more often it was asked, since a process answers no more than a few hundred times."""
        now = time.monotonic()
        for process in processes:
            op = process.ops[-1].seq if process.ops else -1
            key = _key(process)
            asked, times, at = self._asked.get(key, (-1.0, 0, op))
            times = times if at == op else 0
            if now - asked < min(ASKED_S * 1.1 ** min(times, 100), SELDOM_S):
                continue
            self._asked[key] = (now, times + 1, op)
            with suppress(RecordsError):  # it is just ending
                self._folders[key].ask_stacks(process)
            if key in self._mute - self._dumped and self._folders[key].dump(process):
                self._dumped.add(key)  # Python does not answer; C code does, on a signal

    def _dump_frame(self, process: WatchedProcess) -> StackFrame | None:
        try:
            text = (self._folders[_key(process)].path / f"{process.name}.dump").read_text(
                encoding="utf-8", errors="replace"
            )
        except OSError:
            return None
        return dumped_frame(text[-MOST_DUMPED:])


def shortened(process: WatchedProcess) -> WatchedProcess:
    """With its last ops, and those before that are open, as if the others had made room."""
    last = process.ops[-RECENT:]
    if len(last) == len(process.ops) or any(op.number is None for op in last[-1:]):
        return process
    still = [op for op in process.ops[:-RECENT] if not op.done_ns]
    return replace(
        process, ops=[*still, *last], dropped=process.dropped + len(process.ops) - RECENT - len(still)
    )


def _without_old_stacks(signs: Signs, process: WatchedProcess) -> Signs:
    """Without stacks that are older than the rank's last op."""
    last = max((max(op.issued_ns, op.done_ns) for op in process.ops[-50:]), default=0)
    if not process.stacks or process.stacks[-1].at_ns < last:
        return replace(signs, frames={}, outside="", child="")
    return signs

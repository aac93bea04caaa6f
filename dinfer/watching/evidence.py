"""The evidence of one moment about other people's code, and what follows from it: verdict, findings, links, ranks.

It comes from folders that watched processes write to (`Watched`), from traces, or from flight-recorder dumps (`read`).
"""

import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from dinfer.display import Table
from dinfer.errors import DinferError
from dinfer.trace.events import COLLECTIVES, Event, Group
from dinfer.trace.export import TraceError
from dinfer.trace.findings import Findings, RankFinding, with_findings
from dinfer.trace.flight import groups_of, is_dump, read_dumps
from dinfer.trace.read import read_traces
from dinfer.trace.trace import LOOKED, Trace
from dinfer.verdict.completed import OpFinding, findings_of_events
from dinfer.verdict.recorded import explain_events, full_text
from dinfer.verdict.signs import Raised, Signs, StackFrame
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.where import seconds_text
from dinfer.watch.probe.reading import Reader, ask_stacks
from dinfer.watch.probe.records import RecordsError, WatchedProcess
from dinfer.watch.probe.rows import RowsTaken, read_rows
from dinfer.watch.probe.stacks import DUMP_SIGNAL
from dinfer.watching.events import ranks_of, trace_of
from dinfer.watching.kv import WatchedKv
from dinfer.watching.signs import (
    MAIN,
    ProcessPulse,
    as_plain,
    dumped_frame,
    of_plain,
    pulse_of,
    signs_of,
    stack_text,
)

SIGNS, HOSTS, NOW = "signs", "hosts", LOOKED
"""keys of a trace's `about`: what was known of the ranks when it ended, where they ran, and when that was"""

MOST_DUMPED = 1 << 18
"""characters of a dump of stacks that are read, the last"""

STUCK_S = 3.5
"""what should go on by itself, and has not for so long, is stuck: a verdict is to come within 5 s"""

FAILED_TOGETHER_NS = 200_000_000
"""of two ranks that fail, one that does so later than this has lost the other, or the launcher has ended it"""


UNSEEN_NS = 1_000_000_000
"""for so long a process may have lived after its heart was last seen to beat, and said nothing"""


class ExplainError(DinferError, ValueError):
    """There is nothing to explain in what was given."""


@dataclass(frozen=True)
class Evidence:
    """All that is known at one moment. `processes`: of each rank, where these were watched; `now_ns`: when the ranks
    were looked at, None if the record is all there is; `rows`: of KV and taps, by rank, where they were read."""

    trace: Trace
    signs: Mapping[int, Signs] = field(default_factory=dict)
    now_ns: int | None = None
    processes: Mapping[int, WatchedProcess] = field(default_factory=dict)
    rows: Mapping[int, Sequence[RowsTaken]] = field(default_factory=dict)

    @cached_property
    def groups(self) -> dict[str, Group]:
        return groups_of(self.trace)

    @cached_property
    def verdict(self) -> Verdict:
        found = explain_events(self.trace.events, self.signs, self.now_ns, self.groups, STUCK_S)
        stacks = {rank: self.stack(rank) for rank in found.ranks}
        return replace(found, stacks={rank: text for rank, text in stacks.items() if text})

    @cached_property
    def findings(self) -> list[OpFinding]:
        ended = [rank for rank, its in self.signs.items() if its.phase == "done"]
        return [*findings_of_events(self.trace.events, self.groups, ended), *self.kv.diff()]

    @cached_property
    def kv(self) -> WatchedKv:
        return WatchedKv(self.rows)

    @property
    def problem(self) -> Verdict | None:
        """The verdict, if the run will not go on by itself or did not come to its end."""
        return self.verdict if self.verdict.is_hung else None

    def stack(self, rank: int) -> str:
        process = self.processes.get(rank)
        return stack_text(process.stacks[-1]) if process and process.stacks else ""

    # -- ranks and links

    def where(self, rank: int) -> str:
        """What a rank does, in one line."""
        signs = self.signs.get(rank, Signs())
        if signs.raised and not signs.raised.secondary:
            return f"raised {signs.raised.message}"
        if signs.ended or signs.phase == "done":
            return signs.ended or "has ended"
        if signs.is_stopped:
            return "is stopped"
        event = self.at(rank)
        if event is not None and not event.end:
            return f"in {full_text(event)}{self._since(event.start)}"
        doing = "computes" if signs.cpu_moves else "is between ops"
        frame = next(iter(signs.frames.values()), None)
        at = f", at {frame}" if frame else ""
        return f"{doing}{self._since(event.end) if event else ''}{at}"

    def _since(self, at: int) -> str:
        return f", for {seconds_text((self.now_ns - at) / 1e9)}" if self.now_ns else ""

    def at(self, rank: int) -> Event | None:
        """The op that a rank waits in, else the last that it has ended."""
        mine = [event for event in self.trace.events if event.rank == rank]
        waiting = (e for e in mine if not e.end and (not e.call or not e.call.is_async or e.call.is_waited))
        return next(waiting, max(mine, key=lambda event: event.end, default=None))

    @property
    def ranks(self) -> list[int]:
        known = {rank for group in self.groups.values() for rank in group.ranks}
        return sorted({*self.signs, *self.trace.ranks, *known})

    def links(self) -> list[dict[str, Any]]:
        """What went over each link, by source and target, as plain values."""
        waited: dict[tuple[int, int], float] = {}
        for event in self.trace.events:
            if event.kind == "recv" and event.peer is not None and event.end:
                link = (event.peer, event.rank)
                waited[link] = waited.get(link, 0.0) + event.waited / 1e9
        return [
            {
                "source": link.source,
                "target": link.target,
                "messages": link.transfers,
                "bytes": link.bytes,
                "seconds": round(link.wire_s, 6),
                "mb_per_s": round(link.bytes_per_s / 1e6, 3) if link.bytes_per_s else None,
                "waiting_s": round(waited.get((link.source, link.target), 0.0), 6),
            }
            for link in replace(
                self.trace, events=tuple(e for e in self.trace.events if e.end)
            ).link_figures()
        ]

    def collectives(self) -> list[dict[str, Any]]:
        """The collectives of each kind and group, with their bytes, seconds and waiting of all ranks together."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for event in self.trace.events:
            if event.call and event.end and event.kind in COLLECTIVES:
                one = found.setdefault(
                    (event.kind, event.call.group),
                    {
                        "kind": event.kind,
                        "group": event.call.group,
                        "calls": 0,
                        "bytes": 0,
                        "seconds": 0.0,
                        "waiting_s": 0.0,
                    },
                )
                one["calls"] += 1
                one["bytes"] += event.bytes
                one["seconds"] += event.busy / 1e9
                one["waiting_s"] += event.waited / 1e9
        return [found[key] for key in sorted(found)]

    def table(self) -> Table:
        """Links, and below them collectives."""
        rows: list[list[object]] = [
            [f"{one['source']}→{one['target']}", one["messages"], *_figures(one)] for one in self.links()
        ]
        rows += [
            [f"{one['kind']} ({one['group']})", one["calls"], *_figures(one)] for one in self.collectives()
        ]
        return Table(["link", "ops", "MB", "s", "MB/s", "waiting s"], rows)

    def as_dict(self, exit_status: int | None, verdict: Verdict | None) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "verdict": verdict
            and {"kind": verdict.kind, "ranks": list(verdict.ranks), "text": verdict.sentence},
            "findings": [one.as_dict() for one in self.findings],
            "ranks": [self._rank_dict(rank) for rank in self.ranks],
            "links": self.links(),
            "collectives": self.collectives(),
            "exit_status": exit_status,
        }

    def _rank_dict(self, rank: int) -> dict[str, Any]:
        event, process = self.at(rank), self.processes.get(rank)
        return {
            "rank": rank,
            "host": process.host if process else None,
            "pid": process.pid if process else None,
            "where": self.where(rank),
            "line": (event and event.call and event.call.place) or None,
            "layer": event.layer if event else None,
            "chunk": event.chunk if event else None,
            "ops": sum(one.rank == rank for one in self.trace.events),
            "hook": process.hook if process else None,
            "problems": list(process.problems) if process else [],
        }

    def kept(self, verdict: Verdict | None, *, state: str = "") -> Trace:
        """The trace, with what else is known in its `about`, so that it can be explained again and makes a report."""
        about = {**self.trace.about, SIGNS: as_plain(self.signs), NOW: self.now_ns}
        hosts = {str(rank): process.host for rank, process in self.processes.items()}
        about[HOSTS] = about.get(HOSTS, hosts) or hosts
        made = Findings(
            made=time.strftime("%Y-%m-%d %H:%M:%S"),
            state=state or ("hung" if verdict else "done"),
            failure=str(replace(verdict, stacks={})) if verdict else "",  # stacks are those of the ranks
            ranks=tuple(
                RankFinding(rank, host=about[HOSTS].get(str(rank), ""), log=self.stack(rank))
                for rank in self.ranks
            ),
            warnings=tuple(one.text for one in self.findings),
        )
        return with_findings(replace(self.trace, about=about), made)


def _figures(one: Mapping[str, Any]) -> list[str]:
    rate = f"{one['bytes'] / one['seconds'] / 1e6:,.1f}" if one["seconds"] else "–"
    return [f"{one['bytes'] / 1e6:,.3f}", f"{one['seconds']:.3f}", rate, f"{one['waiting_s']:.3f}"]


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


def told_apart(
    signs: Mapping[int, Signs], ranks: Mapping[int, WatchedProcess], gone: Mapping[int, float]
) -> dict[int, Signs]:
    """The signs, in which only the first failure is one: ranks that fail later have lost the first, or its launcher has
    ended them."""
    times: dict[int, float] = {}
    for rank, its in signs.items():
        error = ranks[rank].exception
        if its.raised and not its.raised.secondary and error:
            times[rank] = error.at_ns
        elif its.ended:
            times[rank] = error.at_ns if error else ranks[rank].heartbeat_ns + UNSEEN_NS
    own = {
        rank: at for rank, at in times.items() if not (its := signs[rank]).raised or not its.raised.secondary
    }
    if not own:
        return dict(signs)
    first = min(own.values())
    early = min(gone.values(), default=0.0)
    found = {}
    for rank, its in signs.items():
        is_later = rank in times and times[rank] > first + FAILED_TOGETHER_NS
        if its.ended and not its.raised and rank in gone and gone[rank] > early:
            is_later = True
        if is_later and rank in own and len(own) > 1:
            what = its.raised.message if its.raised else its.ended
            found[rank] = replace(
                its, ended="", raised=Raised(f"{what}, after another rank failed", secondary=True)
            )
        elif its.raised and its.raised.secondary:
            found[rank] = replace(its, ended="")
        else:
            found[rank] = its
    return found


# -- what was recorded before


def read(paths: Sequence[str | Path]) -> Evidence:
    """The evidence in watch folders, flight-recorder dumps or folders of these, or one trace. Raises ExplainError,
    TraceError, OSError."""
    given = [Path(path) for path in paths]
    for path in given:
        path.stat()  # raises where there is nothing
    folders = [path for path in given if path.is_dir() and any(path.glob("*.ops"))]
    if folders:
        return _of_folders(folders, [path for path in given if path not in folders])
    files = list(chain.from_iterable(_files(path) for path in given))
    dumps = [path for path in files if is_dump(path)]
    if dumps:
        return Evidence(read_dumps(dumps))
    traces = [path for path in files if path.suffix in (".jsonl", ".html", ".htm")]
    if len(traces) != 1:
        what = "no watch folder, flight-recorder dump or trace" if not traces else f"{len(traces)} traces"
        raise ExplainError(
            f"there is {what} in {', '.join(map(str, paths))}: give folders of `dinfer watch`, dumps, or one trace."
        )
    return of_trace(read_traces(traces[0])[0])


def _of_folders(folders: list[Path], others: list[Path]) -> Evidence:
    if others:
        raise ExplainError(
            f"{others[0]} is no folder of watched processes, as {folders[0]} is: explain it by itself."
        )
    watched = Watched(folders)
    found = watched.look()
    found = replace(found, rows=watched.rows())
    if watched.unreadable:
        raise ExplainError(f"cannot read what was watched: {'; '.join(watched.unreadable)}.")
    if not any(
        found.processes[rank].ended is None and not found.signs[rank].ended for rank in found.processes
    ):
        return before_they_were_killed(found)
    here = {rank for rank, its in found.signs.items() if its.cpu_moves is not None or its.answers}
    # Processes of other hosts, and copies of a record, cannot be asked: the record is all.
    return found if here else replace(watched.look(live=False), now_ns=None, rows=found.rows)


def before_they_were_killed(found: Evidence) -> Evidence:
    """The evidence of when all ranks were killed together, if they hung by then: somebody has ended the hang."""
    beats = [process.heartbeat_ns for process in found.processes.values()]
    is_killed = all(one.ended is None and one.exception is None for one in found.processes.values())
    is_all = all(its.ended or its.raised for its in found.signs.values())
    if not (beats and is_all and is_killed) or max(beats) - min(beats) > UNSEEN_NS:
        return found
    signs = {rank: replace(its, ended="", raised=None) for rank, its in found.signs.items()}
    earlier = replace(found, signs=signs, now_ns=max(beats))
    return earlier if earlier.problem and not earlier.problem.kind.startswith("stuck") else found


def of_trace(trace: Trace) -> Evidence:
    """The evidence that a trace holds: of `dinfer watch`, of dinfer's own runs, or of other programs. Raises
    TraceError."""
    try:
        signs = of_plain(trace.about.get(SIGNS, {}))
        now = trace.about.get(NOW)
        return Evidence(trace, signs, int(now) if now is not None else None)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise TraceError(f"the trace's signs of life are damaged: {type(error).__name__}: {error}.") from None


def _files(path: Path) -> list[Path]:
    return sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]

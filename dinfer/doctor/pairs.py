"""Latency and bandwidth of every ordered pair of ranks on this host, over gloo, measured by ranks started for it."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic

from dinfer.doctor.report import Check, PairSpeed, rate, significant

SLOW = 4
"""links that are this many times slower than the median are reported"""

GRACE_S = 1.0
"""how long to wait for the cause once one rank has failed: errors of other ranks may arrive first"""


@dataclass
class PairsMeasured:
    """What the ranks reported. `here`: ranks that have started; `died`: how each rank ended that did."""

    pairs: list[PairSpeed] = field(default_factory=list)
    here: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    died: dict[int, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def measure(world_size: int, seconds: float) -> PairsMeasured:
    """Measure all pairs within about `seconds`, whatever the ranks do. All ranks have ended when it returns."""
    with TemporaryDirectory(prefix="dinfer-doctor-") as folder:
        logs = [Path(folder, f"rank{rank}.err") for rank in range(world_size)]
        return _Ranks(logs, seconds).measure()


class _Ranks:
    """The processes, and the client's end of the pipe to each."""

    def __init__(self, logs: Sequence[Path], seconds: float) -> None:
        self._logs, self._seconds = logs, seconds
        self._deadline = monotonic() + seconds
        self._measured = PairsMeasured()
        self._ends: dict[Connection, int] = {}
        self._processes: list[SpawnProcess] = []

    def measure(self) -> PairsMeasured:
        try:
            self._start()
            while self._ends and (ready := wait(list(self._ends), max(0.0, self._deadline - monotonic()))):
                for end in ready:
                    assert isinstance(end, Connection)
                    self._take(end)
        finally:
            self._end()
        return self._measured

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank, log in enumerate(self._logs):
            ours, theirs = context.Pipe()
            arguments = (rank, len(self._logs), theirs, log, self._seconds)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            self._processes.append(process)
            self._ends[ours] = rank
            process.start()
            theirs.close()  # the pipe then ends when the rank does

    def _take(self, end: Connection) -> None:
        rank = self._ends[end]
        try:
            kind, value = end.recv()
        except (EOFError, OSError):
            self._ended(end, rank)
            return
        match kind:
            case "here":
                self._measured.here.add(rank)
            case "port":
                self._introduce(value)
            case "pair":
                self._measured.pairs.append(value)
            case "done":
                self._measured.done.add(rank)
            case "error":
                self._measured.errors.append(value)
                self._hurry()

    def _introduce(self, port: int) -> None:
        for other, rank in self._ends.items():
            if rank:
                with suppress(OSError):  # it has ended; its pipe will show that
                    other.send(port)

    def _ended(self, end: Connection, rank: int) -> None:
        del self._ends[end]
        end.close()
        process = self._processes[rank]
        process.join(GRACE_S)
        if rank not in self._measured.done and process.exitcode != FAILED:
            self._measured.died[rank] = _last_words(process.exitcode, self._logs[rank])
            self._hurry()

    def _hurry(self) -> None:
        self._deadline = min(self._deadline, monotonic() + GRACE_S)

    def _end(self) -> None:
        for process in self._processes:
            if process.pid is not None:
                process.kill()
                process.join()
                process.close()
        for end in self._ends:
            end.close()


def _last_words(status: int | None, log: Path) -> str:
    """How a rank ended, and the last line of its output."""
    how = signal.Signals(-status).name if status is not None and status < 0 else f"status {status}"
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
    return f"{how}: {text.splitlines()[-1][:300]}" if text else how


# -- on the rank

FAILED = 3
"""exit status of a rank that has reported its error"""


def _rank(rank: int, world_size: int, end: Connection, log: Path, seconds: float) -> None:
    _print_into(log)
    threading.Thread(target=_end_with_client, daemon=True).start()
    try:
        _measure(rank, world_size, end, seconds)
    except Exception as error:
        with suppress(OSError):
            end.send(("error", str(error)))
        os._exit(FAILED)  # a thread that is blocked in gloo can only be ended with the process


def _measure(rank: int, world_size: int, end: Connection, seconds: float) -> None:
    import torch

    from dinfer.doctor.pair_rank import measure_links
    from dinfer.transport.gloo import GlooComm, join_store, open_store

    torch.set_num_threads(1)
    end.send(("here", rank))
    if rank == 0:
        store, port = open_store("127.0.0.1", 0)
        end.send(("port", port))
    else:
        store = join_store("127.0.0.1", end.recv(), seconds)
    comm = GlooComm(rank, world_size, store, seconds)
    with closing(comm):
        for pair in measure_links(comm, seconds / 2 / (world_size * (world_size - 1))):
            end.send(("pair", pair))
    end.send(("done", rank))


def _print_into(log: Path) -> None:
    """Redirect all output: gloo prints, and standard output is for the report."""
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _end_with_client() -> None:
    """End this rank when its client has ended, also where that was killed."""
    client = multiprocessing.parent_process()
    if client is not None:
        client.join()
        os._exit(FAILED)


# -- the check


def pairs_check(measured: PairsMeasured, world_size: int, ifname: str = "") -> Check:
    """`ifname`: GLOO_SOCKET_IFNAME, "" if unset."""
    wanted = world_size * (world_size - 1)
    if measured.died:
        rank, how = next(iter(measured.died.items()))
        fix = "free memory, then run dinfer doctor again"
        if not how.startswith("SIGKILL"):
            fix = "pip install --force-reinstall torch"
        return Check("pairs", "fail", f"rank {rank} died of {how}", fix)
    if measured.errors:
        return Check("pairs", "fail", measured.errors[0].splitlines()[0][:400], _fix_of_network(ifname))
    if len(measured.here) < world_size:
        found = f"only {len(measured.here)} of {world_size} ranks started in time"
        return Check("pairs", "unchecked", found, "dinfer doctor --world-size 2")
    if len(measured.pairs) < wanted:
        found = (
            f"all ranks started, but only {len(measured.pairs)} of {wanted} links could be measured in time"
        )
        return Check("pairs", "fail", found, _fix_of_network(ifname))
    return _judge_speed(measured.pairs)


def _fix_of_network(ifname: str) -> str:
    if ifname:
        return "unset GLOO_SOCKET_IFNAME"
    return "let the firewall pass the loopback: sudo iptables -I INPUT -i lo -j ACCEPT"


def _judge_speed(pairs: Sequence[PairSpeed]) -> Check:
    latencies, speeds = [1e3 * pair.latency_s for pair in pairs], [pair.bytes_per_s for pair in pairs]
    slow = [f"{p.source} → {p.target}" for p in pairs if p.bytes_per_s < median(speeds) / SLOW]
    found = (
        f"{len(pairs)} links over gloo, {significant(min(latencies))} to {significant(max(latencies))} ms, "
    )
    found += f"{rate(min(speeds))} to {rate(max(speeds))}"
    if slow:
        fix = "end other work on this host, then run dinfer doctor again"
        return Check("pairs", "warn", f"{found}; slower than 1/{SLOW} of the median: {', '.join(slow)}", fix)
    return Check("pairs", "ok", found)

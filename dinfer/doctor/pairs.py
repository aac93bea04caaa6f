"""Latency and bandwidth of every ordered pair of ranks on this host, over gloo, measured by ranks started for it.

A rank measures its link to each other rank, and answers while others measure. The first 8 bytes of a header are the
number of payload bytes that follow, which the other side answers with an empty header, or END once the link has been
measured. Importing this does not import torch: what goes wrong then is to be told by the rank.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import permutations
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

from dinfer.doctor.report import LET_LOOPBACK_PASS, Check, PairSpeed, rate, significant
from dinfer.plan.graph import Channel

if TYPE_CHECKING:
    from dinfer.transport.gloo import Comm

SLOW = 4
"""links that are this many times slower than the median are reported"""

GRACE_S = 1.0
"""how long to wait for the cause once one rank has failed: errors of other ranks may arrive first"""

FAILED = 3
"""exit status of a rank that has reported its error"""


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
    deadline = monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    ends: dict[Connection, int] = {}
    with TemporaryDirectory(prefix="dinfer-doctor-") as folder:
        logs = [Path(folder, f"rank{rank}.err") for rank in range(world_size)]
        try:
            for rank, log in enumerate(logs):
                ours, theirs = context.Pipe()
                arguments = (rank, world_size, theirs, log, seconds)
                processes.append(context.Process(target=_rank, args=arguments, daemon=True))
                ends[ours] = rank
                processes[rank].start()
                theirs.close()  # the pipe then ends when the rank does
            return _listen(processes, ends, logs, deadline)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
                    process.close()
            for end in ends:
                end.close()


def _listen(
    processes: Sequence[SpawnProcess], ends: dict[Connection, int], logs: Sequence[Path], deadline: float
) -> PairsMeasured:
    """What the ranks say until all have ended, or the time is over. `ends`: of the pipes, each with its rank; those of
    ranks that have ended are taken out."""
    found = PairsMeasured()
    while ends and (ready := wait(list(ends), max(0.0, deadline - monotonic()))):
        for end in ready:
            assert isinstance(end, Connection)
            rank = ends[end]
            try:
                kind, value = end.recv()
            except (EOFError, OSError):
                del ends[end]
                end.close()
                processes[rank].join(GRACE_S)
                status = processes[rank].exitcode
                if rank in found.done or status == FAILED:
                    continue
                kind, value = "died", _last_words(status, logs[rank])
            match kind:
                case "here":
                    found.here.add(rank)
                case "port":
                    for other in [end for end, its_rank in ends.items() if its_rank]:
                        with suppress(OSError):  # it has ended; its pipe will show that
                            other.send(value)
                case "pair":
                    found.pairs.append(value)
                case "done":
                    found.done.add(rank)
                case "error":
                    found.errors.append(value)
                case "died":
                    found.died[rank] = value
            if kind in ("error", "died"):
                deadline = min(deadline, monotonic() + GRACE_S)
    return found


def _last_words(status: int | None, log: Path) -> str:
    """How a rank ended, and the last line of its output."""
    how = signal.Signals(-status).name if status is not None and status < 0 else f"status {status}"
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
    return f"{how}: {text.splitlines()[-1][:300]}" if text else how


# -- on the rank

PINGS, WARM_UP = 20, 2

SIZES = (1 << 18, 1 << 20, 8 << 20, 8 << 20, 8 << 20, 8 << 20)

END = -1


def _rank(rank: int, world_size: int, end: Connection, log: Path, seconds: float) -> None:
    with log.open("wb") as file:  # gloo prints, and standard output is for the report
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_client, daemon=True).start()
    try:
        _measure(rank, world_size, end, seconds)
    except Exception as error:  # whatever it is, the doctor says what the rank ran into
        with suppress(OSError):
            end.send(("error", str(error)))
        os._exit(FAILED)  # a thread that is blocked in gloo can only be ended with the process


def _end_with_client() -> None:
    """End this rank when its client has ended, also where that was killed."""
    client = multiprocessing.parent_process()
    if client is not None:
        client.join()
        os._exit(FAILED)


def _measure(rank: int, world_size: int, end: Connection, seconds: float) -> None:
    import torch

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


def measure_links(comm: "Comm", seconds: float) -> Iterator[PairSpeed]:
    """Measure this rank's links; only one link of all ranks is measured at a time, each for about `seconds`."""
    for source, target in permutations(range(comm.world_size), 2):
        comm.all_gather(b"p")
        if comm.rank == source:
            yield measure_link(comm, target, seconds)
        elif comm.rank == target:
            _answer(comm, source)
    comm.all_gather(b"e")  # a rank that left now would break the measurements of others


def measure_link(
    comm: "Comm", target: int, seconds: float, clock: Callable[[], float] = perf_counter
) -> PairSpeed:
    """Measure the link to `target`, which answers. `clock` counts seconds."""
    import torch

    from dinfer.transport.header import HEADER_BYTES

    there, back = Channel("kv", comm.rank, target), Channel("kv", target, comm.rank)
    data = torch.zeros(max(SIZES), dtype=torch.uint8)
    deadline = clock() + seconds

    def say(size: int) -> None:
        header = size.to_bytes(8, "little", signed=True).ljust(HEADER_BYTES, b"\0")
        comm.send(there, header, data[:size] if size > 0 else None)

    def trip(size: int) -> float:
        started = clock()
        say(size)
        comm.recv_header(back)
        return clock() - started

    trips: list[float] = []
    while len(trips) < WARM_UP + 1 or (len(trips) < WARM_UP + PINGS and clock() < deadline - seconds / 2):
        trips.append(trip(0))
    latency = median(trips[WARM_UP:]) / 2
    speeds: dict[int, list[float]] = {}
    for size in SIZES:  # as long as there is time, so that a slow link is not flooded
        if speeds and clock() + size / median(speeds[max(speeds)]) > deadline:
            break
        took = trip(size)
        # Minus the latency, but at least half of the time remains: the latency was measured at another moment.
        speeds.setdefault(size, []).append(size / max(took - 2 * latency, took / 2))
    say(END)
    return PairSpeed(comm.rank, target, latency, median(speeds[max(speeds)]))


def _answer(comm: "Comm", source: int) -> None:
    """Answer every message of `source` until END comes."""
    import torch

    from dinfer.transport.header import HEADER_BYTES

    there, back = Channel("kv", source, comm.rank), Channel("kv", comm.rank, source)
    out = torch.empty(max(SIZES), dtype=torch.uint8)
    while (size := int.from_bytes(comm.recv_header(there)[:8], "little", signed=True)) != END:
        if size:
            comm.recv_payload(there, out[:size])
        comm.send(back, bytes(HEADER_BYTES), None)


# -- the check


def pairs_check(measured: PairsMeasured, world_size: int, ifname: str = "") -> Check:
    """`ifname`: GLOO_SOCKET_IFNAME, "" if unset."""
    wanted = world_size * (world_size - 1)
    network_fix = "unset GLOO_SOCKET_IFNAME" if ifname else LET_LOOPBACK_PASS
    if measured.died:
        rank, how = next(iter(measured.died.items()))
        fix = "free memory, then run dinfer doctor again"
        if not how.startswith("SIGKILL"):
            fix = "pip install --force-reinstall torch"
        return Check("pairs", "fail", f"rank {rank} died of {how}", fix)
    if measured.errors:
        return Check("pairs", "fail", measured.errors[0].splitlines()[0][:400], network_fix)
    if len(measured.here) < world_size:
        found = f"only {len(measured.here)} of {world_size} ranks started in time"
        return Check("pairs", "unchecked", found, "dinfer doctor --world-size 2")
    if len(measured.pairs) < wanted:
        links = f"{len(measured.pairs)} of {wanted} links"
        found = f"all ranks started, but only {links} could be measured in time"
        return Check("pairs", "fail", found, network_fix)
    latencies = [1e3 * pair.latency_s for pair in measured.pairs]
    speeds = [pair.bytes_per_s for pair in measured.pairs]
    found = f"{wanted} links over gloo, {significant(min(latencies))} to {significant(max(latencies))} ms, "
    found += f"{rate(min(speeds))} to {rate(max(speeds))}"
    slow = [f"{p.source} → {p.target}" for p in measured.pairs if p.bytes_per_s < median(speeds) / SLOW]
    if slow:
        fix = "end other work on this host, then run dinfer doctor again"
        return Check("pairs", "warn", f"{found}; slower than 1/{SLOW} of the median: {', '.join(slow)}", fix)
    return Check("pairs", "ok", found)

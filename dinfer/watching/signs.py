"""What is known of a watched process beside its ops: whether it lives, computes, is stopped, and where it stands."""

import linecache
import re
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dinfer.trace.events import place_of
from dinfer.verdict.signs import Raised, Signs, StackFrame
from dinfer.watch.probe.records import RaisedError, StacksTaken, ThreadLook, WatchedProcess
from dinfer.watching.outside import child_text, child_waited, descendants_of, outside_of

WINDOW_S = 2.0
"""over which CPU time is measured"""

CPU_SHARE = 0.1
"""of one core: a process that waits uses less, probe and all"""

RUNNABLE = 0.5
"""of the looks: a process that was found runnable, or at a disk, in more computes, however little CPU time it gets"""

WAKES_PER_S = 4.0
"""A main thread that goes to sleep so often looks for something again and again, as a server does between requests."""

MUTE_S = 3.0
"""A heart beats four times a second. One that has not for so long is stopped, or C code holds its interpreter."""

MAIN = "MainThread"

_LOST = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|timed out|timeout|remote process exited|"
    r"no route to host|socketpoll|peer|nccl communicator was aborted|store",
    re.IGNORECASE,
)
"""in the message of a DistError or RuntimeError of torch.distributed: the other side was lost, or did not come"""


@dataclass
class _Sample:
    at: float
    cpu_s: float
    runnable: bool
    children: Mapping[int, float] = field(default_factory=dict)
    """CPU seconds of the processes that it has started, and these; looked at while it computes nothing itself"""
    wakes: int | None = None
    """how often its main thread has gone to sleep, if the system says so"""


@dataclass
class ProcessPulse:
    """How one process of this host has lived lately. `gone`: when it was seen to have vanished; `seen_ns`: when it was
    last seen to live, in nanoseconds since the epoch."""

    process: psutil.Process | None
    samples: deque[_Sample] = field(default_factory=deque)
    stopped_since: float | None = None
    gone: float | None = None
    seen_ns: int = 0

    def look(self, now: float) -> None:
        """Take a sample. A process that cannot be read has gone."""
        if self.process is None or self.gone is not None:
            return
        try:
            with self.process.oneshot():
                status = self.process.status()
                times = self.process.cpu_times()
        except psutil.Error:
            self.gone = now
            return
        if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            self.gone = now
            return
        self.seen_ns = time.time_ns()
        is_stopped = status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        self.stopped_since = (self.stopped_since or now) if is_stopped else None
        is_busy = status in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
        self.samples.append(_Sample(now, times.user + times.system, is_busy, wakes=_wakes(self.process.pid)))
        if not self._computes:
            self.samples[-1].children = _cpu_of(descendants_of(self.process.pid))
        while len(self.samples) > 2 and now - self.samples[1].at > WINDOW_S:
            self.samples.popleft()

    def has_gone(self) -> bool:
        """Whether it has vanished since it was last looked at."""
        if self.process is None or self.gone is not None:
            return False
        try:
            return self.process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.Error:
            return True

    @property
    def is_followed(self) -> bool:
        """Whether it can be said how the process lives, not only what it has written."""
        return self.process is not None

    def beat_s(self, watched: WatchedProcess, now_ns: int | None) -> float | None:
        """For how many seconds it has not run Python, as far as is known; None where the clock of its record is another
        one, or the record is all there is."""
        if now_ns is None or watched.host != socket.gethostname():
            return None
        return (now_ns - last_sign(watched)) / 1e9

    @property
    def cpu_moves(self) -> bool | None:
        """Whether it computes, or what it has started does; None: not known yet."""
        return self._computes or self._children_compute

    @property
    def _computes(self) -> bool | None:
        if len(self.samples) < 2 or self.samples[-1].at - self.samples[0].at < WINDOW_S / 2:
            return None
        used = self.samples[-1].cpu_s - self.samples[0].cpu_s
        share = used / (self.samples[-1].at - self.samples[0].at)
        runnable = sum(sample.runnable for sample in self.samples) / len(self.samples)
        return share > CPU_SHARE or runnable > RUNNABLE

    @property
    def polls(self) -> bool:
        """Whether its main thread wakes up again and again, and sleeps."""
        if self._computes is not False:
            return False
        first, last = self.samples[0], self.samples[-1]
        if first.wakes is None or last.wakes is None:
            return False
        return last.wakes - first.wakes >= WAKES_PER_S * (last.at - first.at)

    @property
    def _children_compute(self) -> bool | None:
        if self._computes is None:
            return None
        looked = [sample for sample in self.samples if sample.children]
        if len(looked) < 2:
            return False
        first, last = looked[0].children, looked[-1].children
        used = sum(last[pid] - first[pid] for pid in last.keys() & first.keys())
        return used > CPU_SHARE * (looked[-1].at - looked[0].at)


def _wakes(pid: int) -> int | None:
    """The voluntary context switches of a process's main thread; None where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/task/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)$", status, re.MULTILINE)
    return int(found[1]) if found else None


def _cpu_of(pids: Iterable[int]) -> dict[int, float]:
    found = {}
    for pid in pids:
        with suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            found[pid] = times.user + times.system
    return found


def pulse_of(watched: WatchedProcess) -> ProcessPulse:
    """Of a process on this host; one that has vanished already, or whose number another has now, is gone."""
    if watched.host != socket.gethostname():
        return ProcessPulse(None)
    try:
        process = psutil.Process(watched.pid)
        if process.create_time() > watched.started_ns / 1e9 + 2:
            return ProcessPulse(None, gone=0.0)
    except psutil.Error:
        return ProcessPulse(None, gone=0.0)
    return ProcessPulse(process)


def signs_of(
    watched: WatchedProcess, pulse: ProcessPulse | None, now: float, now_ns: int | None = None
) -> Signs:
    """`now`: seconds on the clock of the pulse; `now_ns`: nanoseconds since the epoch, None: the record is all there
    is. `pulse`: None where the process is of another host, or of a record."""
    ended, phase = _ended(watched, pulse)
    is_alive = not ended and phase != "done"
    stopped = pulse is not None and pulse.stopped_since is not None and now - pulse.stopped_since >= 0.3
    beat_s = (pulse or ProcessPulse(None)).beat_s(watched, now_ns)
    answers = None if not is_alive or stopped or beat_s is None else beat_s < MUTE_S
    taken = watched.stacks[-1] if watched.stacks and is_alive else None
    thread = watched.ops[-1].thread if watched.ops else MAIN
    outside = outside_of(taken, thread) if taken else ""
    if not outside and pulse and pulse.polls and is_alive:
        outside = "something that it looks for again and again"
    waits_for_child = taken is not None and child_waited(taken, thread)
    return Signs(
        phase=phase,
        process="T" if stopped and is_alive else None,
        cpu_moves=pulse.cpu_moves if pulse and is_alive else None,
        answers=answers,
        ended=ended,
        raised=_raised(watched),
        between_cells=phase == "done" and watched.ended is None,
        frames=frames_of(taken, thread) if taken else {},
        outside=outside,
        child=child_text(watched.pid, bool(pulse and pulse.process)) if waits_for_child else "",
    )


def last_sign(watched: WatchedProcess) -> int:
    """When the process was last known to run Python, in nanoseconds since the epoch."""
    ops = (max(op.issued_ns, op.done_ns) for op in watched.ops[-50:])
    return max(watched.heartbeat_ns, watched.started_ns, *ops, 0)


def _ended(watched: WatchedProcess, pulse: ProcessPulse | None) -> tuple[str, str]:
    """How the process died, "" if it did not, and its phase: "done" once its program has ended by itself."""
    how = watched.ended
    if how == "exit":
        return "", "done"
    if how == "exception":
        if watched.exception and watched.exception.thread != MAIN:
            return "", "done"  # a thread of it ended by one; the program itself went on to its end
        return "ended by its exception", "prefill"
    if how:  # os._exit(3)
        return ("", "done") if how.endswith("(0)") else (f"ended by {how}", "prefill")
    if pulse and pulse.gone is not None:
        return "died: a signal killed it, or C code ended it", "prefill"
    return "", "done" if watched.cell == "ended" else "prefill"


def _raised(watched: WatchedProcess) -> Raised | None:
    """The exception that ended it or one of its threads, or that it handles while it waits in an op."""
    error, is_handled = watched.exception, False
    is_of_cell = False
    if error is None or error.thread != MAIN or _goes_on(watched, error):
        of_cell = _of_cell(watched)
        error, is_handled = _handled(watched) or of_cell or error, True
        is_of_cell = error is not None and error is of_cell
    if error is None:
        return None
    lines = error.message.strip().splitlines() or [""]
    place = place_of(error.file, error.line) if error.line else ""
    is_lost = error.type.rpartition(".")[2] in _LOST_TYPES and bool(_LOST.search(error.message))
    said = f"{error.type}: {lines[0]}" if lines[0] else error.type
    if is_of_cell and is_lost:
        is_handled = (
            False  # a cell that has lost another rank says that this one has ended, whoever waits for it now
        )
    return Raised(said, op=place, lane=error.thread, secondary=is_lost, handled=is_handled)


def _goes_on(watched: WatchedProcess, error: RaisedError) -> bool:
    """Whether it has issued ops since, as after an exception that somebody has only printed as if it ended all."""
    return watched.ended is None and any(op.issued_ns > error.at_ns for op in watched.ops[-50:])


def _handled(watched: WatchedProcess) -> RaisedError | None:
    """The exception in whose handler the process waits."""
    waiting = {op.seq for op in watched.ops[-50:] if not op.done_ns and (op.waited_ns or not op.is_async)}
    found = (one for one in reversed(watched.handled) if one.seq in waiting and one.type not in _USUAL)
    return next(found, None)


def _of_cell(watched: WatchedProcess) -> RaisedError | None:
    """The exception that ended the last cell of a notebook, where no other runs."""
    found = watched.cell_raised
    return found if found and found.type not in _USUAL else None


_USUAL = frozenset({"StopIteration", "StopAsyncIteration", "GeneratorExit", "Empty", "KeyboardInterrupt"})
"""exceptions by which loops and programs end"""

_LOST_TYPES = frozenset(
    {"RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError", "DistError"}
)


def frames_of(taken: StacksTaken, first: str = MAIN) -> Mapping[str, StackFrame]:
    """Where each thread with user code stands: first the one of that name, then the main thread."""
    found = {}
    for thread in sorted(taken.threads, key=lambda one: one.name != first):
        if frame := _frame(thread):
            found[thread.name] = frame
    return found


def _frame(thread: ThreadLook) -> StackFrame | None:
    if not thread.frames or (thread.name != MAIN and not thread.user_frames):
        return None
    file, line, function, text = thread.frames[0]
    return StackFrame(file, line, function, text)


_DUMPED = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
_HEAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*$", re.MULTILINE)
_NOT_OF_USERS = ("/torch/", "/dinfer/watch/", "dinfer_probe", "/lib/python3", "<frozen")


def dumped_frame(text: str) -> StackFrame | None:
    """Of what faulthandler has written, where the main thread's user code stands: the last thread that has any."""
    found = None
    for thread in _HEAD.split(text)[1:]:
        for file, line, function in _DUMPED.findall(thread):
            if "site-packages" in file or not any(part in file for part in _NOT_OF_USERS):
                if any(part in file for part in _NOT_OF_USERS[:3]):
                    continue
                found = StackFrame(file, int(line), function, linecache.getline(file, int(line)).strip())
                break
    return found


def stack_text(taken: StacksTaken) -> str:
    """The stacks of all threads with user code as lines, innermost first."""
    lines = []
    for thread in taken.threads:
        if thread.user_frames or thread.name == MAIN:
            lines.append(f"thread {thread.name}:")
            for file, line, function, text in thread.frames[: thread.user_frames or 5]:
                lines.append(f"  {place_of(file, line)} in {function}{f': {text}' if text else ''}")
    return "\n".join(lines)


def as_plain(signs: Mapping[int, Signs]) -> dict[str, Any]:
    """What is worth keeping in a trace's `about`, as JSON has it."""
    return {
        str(rank): {
            "phase": its.phase,
            "ended": its.ended,
            "stopped": its.is_stopped,
            "answers": its.answers,
            "cpu_moves": its.cpu_moves,
            "raised": its.raised
            and [
                its.raised.message,
                its.raised.op,
                its.raised.secondary,
                its.raised.handled,
                its.raised.lane,
            ],
            "outside": its.outside,
            "child": its.child,
            "between_cells": its.between_cells,
            "frames": {name: list(frame[:4]) for name, frame in its.frames.items()},
        }
        for rank, its in signs.items()
    }


def of_plain(values: Mapping[str, Any]) -> dict[int, Signs]:
    """The inverse. Raises ValueError, TypeError, KeyError, AttributeError for something else."""
    found = {}
    for rank, its in values.items():
        raised = its.get("raised")
        found[int(rank)] = Signs(
            phase=str(its["phase"]),
            ended=str(its["ended"]),
            process="T" if its.get("stopped") else None,
            answers=its.get("answers"),
            cpu_moves=its.get("cpu_moves"),
            raised=_raised_of_plain(raised) if raised else None,
            outside=str(its.get("outside", "")),
            child=str(its.get("child", "")),
            between_cells=bool(its.get("between_cells", False)),
            frames={
                str(name): StackFrame(str(at[0]), int(at[1]), str(at[2]), str(at[3]))
                for name, at in its.get("frames", {}).items()
            },
        )
    return found


def _raised_of_plain(value: Sequence[Any]) -> Raised:
    """Traces that were written before lack the last two."""
    message, op, secondary, handled, lane = (*value, False, "")[:5] if len(value) < 5 else value
    return Raised(str(message), op=str(op), lane=str(lane), secondary=bool(secondary), handled=bool(handled))

"""The ranks' side of `dinfer bench session`: one prefill with recorder and watcher, or without. Called in engines."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter, process_time
from typing import Any

from dinfer.engine.hosting import kernel
from dinfer.trace.events import Event


class _Nothing:
    """A recorder that keeps nothing."""

    def record(self, lane: int, event: Event) -> None:
        pass


def timed_prefill(recording: bool) -> dict[str, Any]:
    """Run the prompt that all ranks have prepared; all make this call. Seconds, and CPU seconds of rank and watcher.

    Without `recording` no event is kept, and the watcher is stopped meanwhile.
    """
    current = kernel._current
    assert current
    engine = current.host.engine
    assert engine
    executor, watcher = engine.executor, current.control.watcher.pid
    if not recording:
        executor.recorder = _Nothing()  # type: ignore[assignment]  # all that lanes do with it
    engine.comm.all_gather(b"ready")
    with _stopped(0 if recording else watcher):
        used, began, cpu = _cpu_seconds(watcher), perf_counter(), process_time()
        executor.run_to_end()
        seconds = perf_counter() - began
        used = _cpu_seconds(watcher) - used
    return {"seconds": seconds, "cpu_s": process_time() - cpu, "watcher_cpu_s": used}


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    if not pid:
        yield
        return
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _cpu_seconds(pid: int) -> float:
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)

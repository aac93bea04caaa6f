"""A real process that computes and gets next to no CPU time is told from one that waits on the same busy core."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from dinfer.cluster.ranks import RankState
from dinfer.monitor.signs import CPU_LEAST_S, CPU_SHARE, GIL_SHARE, Track
from dinfer.rank.process import LOOKS, Wanting, sign_of_life
from tests.support.runs import wait_for

SPINS = "print('up', flush=True)\nwhile True: pass"
SPINS_ASIDE = f"os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n{SPINS}"
"""only when nobody else wants the core"""
WAITS = """
import threading, time
threading.Thread(target=lambda: [time.sleep(0.1) for _ in iter(int, 1)], daemon=True).start()
print('up', flush=True)
threading.Event().wait()
"""
"""while a thread beside it wakes now and then, as a rank's do"""


@contextmanager
def on_core(core: int, script: str) -> Iterator[int]:
    """The id of a process that runs this on that core."""
    pinned = f"import os\nos.sched_setaffinity(0, [{core}])\n{script}"
    with subprocess.Popen([sys.executable, "-c", pinned], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        try:
            yield process.pid
        finally:
            process.kill()


def cpu_moves(pid: int) -> tuple[bool | None, float]:
    """What a track says of it, from looks closer to one another than a watcher's; and its share of a core."""
    wanting, track, looks = Wanting(pid), Track(1), 0
    begin, first = time.monotonic(), sign_of_life(pid)
    assert first

    def is_known() -> bool:
        nonlocal looks
        looks += 1
        life = sign_of_life(pid)
        assert life
        track.look([RankState(cpu_s=life.cpu_s, wants_cpu=wanting.look())], time.monotonic())
        return looks >= LOOKS and time.monotonic() - begin > 2 * CPU_LEAST_S

    wait_for(is_known, "it is looked at for long enough")
    last = sign_of_life(pid)
    assert last
    return track.cpu_moves(0), (last.cpu_s - first.cpu_s) / (time.monotonic() - begin)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="no process can be starved on purpose here")
def test_a_spinner_that_is_starved_is_told_from_one_that_waits() -> None:
    core = min(os.sched_getaffinity(0))
    with ExitStack() as stack:
        spins, waits = (stack.enter_context(on_core(core, script)) for script in (SPINS_ASIDE, WAITS))
        stack.enter_context(on_core(core, SPINS))
        moves, share = cpu_moves(spins)
        assert share < CPU_SHARE  # or nothing is shown
        assert moves is True
        assert cpu_moves(waits)[0] is False


HOLDS = """
import ctypes, threading
for _ in range(12): threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()
print('up', flush=True)
{holds}
"""
"""twelve threads wait for the GIL, which the main thread keeps from the next switch on"""


@pytest.mark.parametrize(
    ("holds", "computes"),
    [("ctypes.PyDLL(None).usleep(600_000_000)", False), ("sum(range(10**15))", True)],
)
def test_of_who_holds_the_gil_the_busiest_thread_says_whether_it_computes(holds: str, computes: bool) -> None:
    core = min(os.sched_getaffinity(0))
    with ExitStack() as stack:
        pid = stack.enter_context(on_core(core, HOLDS.format(holds=holds)))
        stack.enter_context(on_core(core, SPINS))  # a slow machine
        wanting = Wanting(pid)

        def is_told() -> bool:
            wanting.look()
            return wanting.busiest is not None and (wanting.busiest > GIL_SHARE) is computes

        assert wanting.busiest is None
        wait_for(is_told, "it is told")


def test_who_is_gone_wants_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert Wanting(process.pid).look() == 0.0

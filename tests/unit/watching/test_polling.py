"""A rank that sleeps in a loop, as a server does between requests, hangs nobody."""

import subprocess
import sys
import time

import psutil
import pytest

from dinfer.watching.signs import ProcessPulse
from tests.support.runs import wait_for


@pytest.mark.parametrize(
    ("work", "polls"),
    [
        ("while True: time.sleep(0.05)", True),
        ("time.sleep(1000)", False),
        ("lock = threading.Lock(); lock.acquire(); lock.acquire()", False),
    ],
)
def test_a_main_thread_that_wakes_up_again_and_again_polls(work: str, polls: bool) -> None:
    """A thread beside it that does, as the probe's own, says nothing of it."""
    beside = "threading.Thread(target=lambda: [time.sleep(0.05) for _ in range(10**6)], daemon=True).start()"
    program = f"import threading, time; {beside}; print(flush=True)\n{work}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        pulse = ProcessPulse(psutil.Process(process.pid))

        def is_seen() -> bool:
            pulse.look(time.monotonic())
            return pulse.cpu_moves is False and pulse.polls == polls

        wait_for(is_seen, "it is known how it lives")
        process.kill()
    assert not pulse.gone

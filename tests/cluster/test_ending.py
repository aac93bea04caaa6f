"""However a run is ended, nothing of it is left: no process, no listening socket, no shared memory."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.fixtures import Start
from tests.support.runs import Fault, Run, is_alive, run_arguments, wait_for
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IDS = tuple(prompt(22))
WORLD_SIZE = 2
BLOCKED = Fault("while True: time.sleep(60)", layer=5)
FLAGS: dict[str, Any] = {"world_size": WORLD_SIZE, "prompt_ids": IDS, "chunk_size": 4}


@contextmanager
def nothing_left(run: Run) -> Iterator[None]:
    """All processes of the run are gone after what is done inside, and all they held."""
    members = run.started(WORLD_SIZE)
    yield
    wait_for(lambda: not any(map(is_alive, members)) and not run.members(), "no process is left")
    ids = {process.pid for process in members}
    assert not [found for found in psutil.net_connections() if found.pid in ids]
    assert not [name for name in _shared_memory() if ids.intersection(map(int, re.findall(r"\d+", name)))]


def _shared_memory() -> list[str]:
    """Its names, which have the ids of the processes that made it."""
    return os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []


def _listening(run: Run) -> set[int]:
    found = (connection for process in run.members() for connection in process.net_connections("tcp"))
    return {connection.laddr.port for connection in found if connection.status == psutil.CONN_LISTEN}


def _is_bound(port: int) -> bool:
    return any(
        found.laddr and found.laddr.port == port and found.status == psutil.CONN_LISTEN
        for found in psutil.net_connections("tcp")
    )


@pytest.mark.parametrize(
    ("number", "during"),
    [
        (signal.SIGINT, "prefill"),
        pytest.param(signal.SIGTERM, "start", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "start", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "prefill", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_all_ranks(number: signal.Signals, during: str, model: Path, start: Start) -> None:
    run = start(model, BLOCKED, **FLAGS)
    ports: set[int] = set()
    with nothing_left(run):
        if during == "prefill":
            wait_for((run.folder / "fault.at").exists, "rank 1 is blocked")
            ports = _listening(run)
            assert ports
        run.process.send_signal(number)
        assert run.finish() == 130
    assert run.err == "dinfer: interrupted; all ranks were ended.\n"
    assert not any(map(_is_bound, ports))


@pytest.mark.slow
def test_ranks_end_when_their_client_is_killed_while_they_are_busy(model: Path, start: Start) -> None:
    """Rank 0 has far more to say than fits into the queues of a connection that nobody reads."""
    run = start(model, **FLAGS, max_new_tokens=4000)
    with nothing_left(run):
        wait_for(lambda: run.out.count(" ") and "\n\n" in run.out, "text flows")
        run.process.kill()
        run.process.wait()


@pytest.mark.slow
def test_ranks_end_when_their_client_is_killed_while_they_are_blocked(model: Path, start: Start) -> None:
    run = start(model, BLOCKED, **FLAGS)
    with nothing_left(run):
        wait_for((run.folder / "fault.at").exists, "rank 1 is blocked")
        run.process.kill()
        run.process.wait()


def test_ranks_end_though_nobody_waits_for_their_killed_client(model: Path, start: Start) -> None:
    """As in a container whose first process reaps nobody: the client stays in the process table."""
    run = start(model, BLOCKED, **FLAGS)
    with nothing_left(run):
        wait_for((run.folder / "fault.at").exists, "rank 1 is blocked")
        run.process.kill()


def test_an_output_that_nobody_reads_any_more_ends_the_run(model: Path, tmp_path: Path) -> None:
    """As in `dinfer run … | head -1`."""
    command = f'"{sys.executable}" -m dinfer.cli "$@" | head -1'
    program = ("bash", "-o", "pipefail", "-c", command, "dinfer")
    run = Run(tmp_path, run_arguments(model, **FLAGS, max_new_tokens=4000), {}, program)
    try:
        assert run.finish() == 1
        assert "standard output was closed, so the run and all its ranks were ended." in run.err
        assert len(run.out.splitlines()) == 1
        wait_for(lambda: not run.members(), "no process is left")
    finally:
        run.end()

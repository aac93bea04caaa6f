"""Engines whose client is gone: they end with their cluster where dinfer started it, and stay where it was joined."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import dinfer
from dinfer.cluster.ipyparallel.attach import attach
from dinfer.cluster.ipyparallel.clean import clean
from tests.support.ipclusters import IPython, ended, ipython
from tests.support.runs import is_alive, wait_for
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PATIENCE_S = 3
IDS = list(prompt(22))
SLOW = """
from dinfer.engine import ops
def slow(state, op, comm, unslowed=ops.HANDLERS["layer"]):
    import time
    time.sleep(0.5)
    return unslowed(state, op, comm)
ops.HANDLERS["layer"] = slow
"""
CLIENT = """
import sys
import dinfer
model, ids, patience, start, slow = {model!r}, {ids!r}, {patience}, {start}, {slow!r}
session = dinfer.connect(n=2, patience=patience, start=start).load(model, threads=1)
cluster = session.ranks.cluster
cluster.call(None, "builtins:exec", slow, {{}})
run = session.prefill(ids, chunk_size=4, max_new_tokens=4, paused=not slow)
pids = [*cluster.call(None, "os:getpid"), cluster.controller_pid]
print("ready", *pids, flush=True)
for line in sys.stdin:
    print(run.step(), "stepped", flush=True)
"""
WHERE = "__import__('dinfer.rank.kernel').rank.kernel._current.host.engine.executor"
PAUSED = f"""(lambda stand: all(
    limit == position + begun
    for position, begun, limit in zip(stand.positions, stand.started, stand.limits)
))({WHERE}.stand())"""
"""whether nothing begins there any more; a recv that has begun goes on waiting"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[IPython]:
    """An IPYTHONDIR without any cluster."""
    with ipython(tmp_path) as place:
        yield place


class Client:
    """A process that holds a session, as a notebook's kernel does."""

    def __init__(self, place: IPython, model: Path, *, start: bool, slow: str = "") -> None:
        code = CLIENT.format(model=str(model), ids=IDS, patience=PATIENCE_S, start=start, slow=slow)
        self._input, theirs = os.pipe()[::-1]
        self._place = place
        self.process: subprocess.Popen[bytes] = place.start("-c", code, stdin=theirs)
        os.close(theirs)
        wait_for(lambda: "ready" in self.said or self.process.poll() is not None, "the session is there")
        found = re.search(r"^ready ([\d ]+)$", self.said, re.MULTILINE)
        assert found, self.said
        *self.engines, self.controller = map(int, found[1].split())

    @property
    def said(self) -> str:
        return self._place.output(self.process)

    def step(self) -> None:
        os.write(self._input, b"step\n")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._input)


def test_in_a_cluster_that_dinfer_started_they_end_themselves(place: IPython, model: Path) -> None:
    client = Client(place, model, start=True)
    client.step()
    wait_for(lambda: "stepped" in client.said, "a step")
    assert not ended(client.engines[:1])
    client.kill()
    wait_for(lambda: ended([*client.engines, client.controller]), "engines and controller end")
    wait_for(lambda: not place.members(), "nothing is left")
    assert [found.done for found in clean()] == ["ended"]  # only files are left
    assert place.files() == []


@pytest.mark.slow
def test_a_client_that_sleeps_is_not_gone(place: IPython, model: Path) -> None:
    client = Client(place, model, start=True)
    os.kill(client.process.pid, signal.SIGSTOP)
    awake = time.monotonic() + 3 * PATIENCE_S
    wait_for(lambda: time.monotonic() > awake, "three times the patience has passed")
    assert all(is_alive(psutil.Process(pid)) for pid in [*client.engines, client.controller])
    os.kill(client.process.pid, signal.SIGCONT)
    client.step()
    wait_for(lambda: "stepped" in client.said or client.process.poll() is not None, "the session goes on")
    assert "stepped" in client.said, client.said
    client.kill()
    wait_for(lambda: not place.members(), "nothing is left")


@pytest.mark.slow
def test_in_a_cluster_that_was_joined_the_run_pauses_and_they_stay(place: IPython, model: Path) -> None:
    place.ipcluster(2)
    wait_for(lambda: (place.profile_dir / "security/cluster-.json").exists(), "ipcluster has begun")
    client = Client(place, model, start=False, slow=SLOW)
    client.kill()
    cluster = attach(2, start=False)
    try:
        wait_for(
            lambda: all(cluster.call(None, "builtins:eval", PAUSED, timeout=60)),
            "the run pauses",
        )
        assert not all(cluster.call(None, "builtins:eval", f"{WHERE}.is_done()", timeout=60))
        assert cluster.call(None, "os:getpid") == client.engines
    finally:
        cluster.close()
    with dinfer.connect(n=2, start=False) as session:  # as a kernel that was restarted does
        session.load(str(model), threads=1)
        run = session.prefill(IDS, chunk_size=11, max_new_tokens=4, paused=True)
        assert len(run.decode().tokens) == 4
        assert len(set(run.sha256())) == 1
    assert not ended([client.controller])
    assert not any(ended([pid]) for pid in client.engines)

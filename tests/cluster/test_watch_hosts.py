"""A job on two hosts under `dinfer watch --listen` and `--join`: judged as on one, with what each host alone can see.

The hosts are network namespaces with names of their own, which root can make.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dinfer.lab.hosts import LabHost, LabNetwork, hosts, why_not
from tests.support.defect_list import assert_right, told_of
from tests.support.runs import wait_for
from tests.support.watched import PROGRAMS, REPOSITORY, own_session

WHY_NOT = why_not()

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(WHY_NOT), reason=f"hosts cannot be made: {WHY_NOT}"),
]


class Part:
    """`dinfer watch` on one host, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line))

    def said(self, words: str) -> tuple[float, str] | None:
        return next((line for line in list(self.lines) if words in line[1]), None)

    @property
    def text(self) -> str:
        return "".join(line for _, line in list(self.lines))


@pytest.fixture
def network() -> Iterator[LabNetwork]:
    with hosts(2) as made:
        yield made


StartJob = Callable[..., tuple[Part, Part]]


@pytest.fixture
def job(network: LabNetwork, tmp_path: Path) -> Iterator[StartJob]:
    """Starts a program by torchrun on both hosts; the first listens, the second joins."""
    with ExitStack() as stack:

        def part(rank: int, host: LabHost, options: list[str], program: list[str]) -> Part:
            command = [
                *host.inside("unshare", "--uts", "sh", "-c", f'hostname host{rank}; exec "$@"', "sh"),
                *(sys.executable, "-m", "dinfer.cli", "watch", "--folder", str(tmp_path / f"part{rank}")),
                *(*options, "--"),
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--node-rank", str(rank), "--master-addr", network.hosts[0].address),
                *("--master-port", "29500", str(PROGRAMS / program[0]), *program[1:]),
            ]
            path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))))
            own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": path}
            piped: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            return Part(stack.enter_context(own_session(command, env={**os.environ, **own}, **piped)))

        def start(*program: str) -> tuple[Part, Part]:
            first, second = network.hosts
            listening = ["--listen", f"{first.address}:0", "--json", str(tmp_path / "told.json")]
            head = part(0, first, listening, list(program))
            wait_for(lambda: head.said("--join"), "the first host listens")
            found = head.said("--join")
            assert found
            address = found[1].partition("--join ")[2].split()[0]
            return head, part(1, second, ["--join", address], list(program))

        yield start


def told(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "told.json").read_text())
    return found


def end(*parts: Part) -> None:
    """End them as a user would, by Ctrl-C's signal to each host's command."""
    for one in parts:
        one.process.send_signal(signal.SIGTERM)
    for one in parts:
        one.process.wait(60)


def test_a_hang_between_hosts_is_told_on_both_with_both_lines(job: StartJob, tmp_path: Path) -> None:
    head, other = job("defects.py", "gather_against_recv")
    wait_for(lambda: head.said("✖"), "the hang is told")
    wait_for(lambda: other.said("✖"), "on the other host, too")
    assert "host host1 has joined" in head.text
    assert "told where it was joined" in other.text
    end(head, other)
    found = told(tmp_path)
    assert_right(told_of(found["verdict"], found["findings"], "gather_against_recv"), "gather_against_recv")
    assert (tmp_path / "part0/host1-host1").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["stops_in_python", "stops_in_c", "stops_by_signal", "dies", "raises", "both_send_first"]
)
def test_what_only_the_other_host_can_see_is_told(job: StartJob, tmp_path: Path, name: str) -> None:
    head, other = job("defects.py", name)
    wait_for(lambda: head.said("✖"), f"it is told\n{head.text}\n{other.text}")
    end(head, other)
    found = told(tmp_path)
    assert_right(told_of(found["verdict"], found["findings"], name), name)


@pytest.mark.slow
@pytest.mark.parametrize("program", [("healthy.py", "one_f_one_b"), ("defects.py", "appended_twice")])
def test_a_job_that_ends_is_whole_and_without_alarm(
    job: StartJob, tmp_path: Path, program: tuple[str, str]
) -> None:
    head, other = job(*program)
    wait_for(lambda: head.process.poll() is not None and other.process.poll() is not None, "both have ended")
    assert (head.process.returncode, other.process.returncode) == (0, 0), head.text + other.text
    found = told(tmp_path)
    assert found["verdict"] is None
    assert {one["kind"] for one in found["findings"]} == set(KINDS.get(program[1], ()))
    assert {(link["source"], link["target"]) for link in found["links"]} >= {(0, 1)}


KINDS = {"appended_twice": ("rows repeated",)}
"""what is found in programs that end though they are wrong"""


@pytest.mark.slow
def test_a_host_that_is_lost_is_named(job: StartJob) -> None:
    head, other = job("defects.py", "gather_against_recv")
    wait_for(lambda: head.said("✖"), "the hang is told")
    other.process.kill()  # with all that it would say
    wait_for(lambda: head.said("nothing has been heard of host host1"), "it is missed")
    head.process.send_signal(signal.SIGTERM)
    head.process.wait(60)

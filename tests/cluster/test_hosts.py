"""Hosts on one machine: wires that are really cut, a session whose ranks are on several, and nothing that is left."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dinfer.cluster.ipyparallel.attach import ClusterPlace
from dinfer.lab.hosts import LabNetwork, do, hosts
from dinfer.session.connect import connect
from tests.support.hosted import needs_hosts
from tests.support.ipclusters import ipython
from tests.support.runs import wait_for
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300), needs_hosts]

IDS = list(prompt(22))
ECHO = """
import socket, sys
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
connection, _ = server.accept()
while data := connection.recv(100):
    connection.sendall(data)
"""
TALK = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
for line in sys.stdin:
    connection.sendall(line.encode())
    print(connection.recv(100).decode().strip(), flush=True)
"""
MAKE = """
import sys
from dinfer.lab.hosts import hosts
with hosts(2) as network:
    print(network.hub, network.address, *(host.namespace for host in network.hosts), flush=True)
    sys.stdin.read()
"""


def started(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def talk(network: LabNetwork, one: int, other: int) -> Iterator[subprocess.Popen[str]]:
    """A connection between two hosts: a line said comes back from the other."""
    there = network.hosts[other]
    with (
        started(*there.inside(sys.executable, "-c", ECHO, there.address)) as server,
        started(
            *network.hosts[one].inside(sys.executable, "-c", TALK, there.address, answer(server))
        ) as client,
    ):
        yield client
        server.kill()
        client.kill()


def say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def namespaces() -> str:
    return do("ip", "netns", "list")


def addresses() -> str:
    return do("ip", "-4", "address", "show")


def test_a_wire_that_is_cut_carries_nothing_and_its_connections_stay() -> None:
    with hosts(3) as network, ExitStack() as stack:
        cut, other = (stack.enter_context(talk(network, *pair)) for pair in ((0, 1), (0, 2)))
        for process in (cut, other):
            say(process, "whole")
            assert answer(process) == "whole"
        do(*network.slow(0, 1, 10_000_000))
        do(*network.cut(0, 1))
        say(cut, "cut")
        say(other, "first")
        assert answer(other) == "first"
        # Sent over and over meanwhile, to no avail: only what is mended brings it there.
        retransmitted = "retrans:0/"
        wait_for(
            lambda: (
                retransmitted in do(*network.hosts[0].inside("ss", "-ti", "dst", network.hosts[1].address))
            ),
            "it is sent again",
        )
        network.mend()
        assert answer(cut) == "cut"
    assert network.hub not in namespaces()
    assert network.address not in addresses()


@pytest.mark.parametrize("how", ["its end", "killed"])
def test_nothing_is_left_however_it_ends(how: str) -> None:
    with started(sys.executable, "-c", MAKE) as maker:
        hub, address, first, second = answer(maker).split()
        assert all(name in namespaces() for name in (hub, first, second))
        assert address in addresses()
        with started("ip", "netns", "exec", first, "sleep", "1000" if how == "its end" else "1") as inside:
            wait_for(lambda: do("ip", "netns", "pids", first), "something runs there")
            if how == "killed":
                maker.kill()
            maker.communicate()
            assert (inside.wait(60) == 0) == (how == "killed")  # then what runs may end by itself
    wait_for(lambda: not any(name in namespaces() for name in (hub, first, second)), "they are gone")
    assert address not in addresses()


@pytest.mark.slow
@pytest.mark.parametrize("where", [(None, 1, 2), (0, None, 2), (0, 0, 0)])
def test_a_session_whose_ranks_are_on_other_hosts(
    tmp_path: Path, model: Path, where: Sequence[int | None]
) -> None:
    """By rank, the number of its host; None: this one. The fault lab has each on one of its own."""
    parameters: dict[str, Any] = {"chunk_size": 4, "max_new_tokens": 4}
    with connect("threads", 3) as session:
        run = session.load(str(model), threads=1).prefill(IDS, paused=True, **parameters)
        wanted = run.decode().tokens, run.sha256()
    with hosts(3) as network, ipython(tmp_path):
        behind = [() if number is None else network.hosts[number].inside() for number in where]
        with connect("ipyparallel", 3, start=True, place=ClusterPlace(network.address, behind)) as session:
            run = session.load(str(model), threads=1).prefill(IDS, paused=True, **parameters)
            assert (run.decode().tokens, run.sha256()) == wanted
            session.ranks.kill(2)
            assert "rank 2 is started again" in session.recover()
            run.restart()
            assert (run.decode().tokens, run.sha256()) == wanted

"""The clock of a rank's host is read over the link that the rank has: by a real watcher, whose clock is another."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import pytest

from dinfer.cluster.link import Link
from dinfer.rank.watcher import MEMORY_BYTES

DEADLINE_S = 120
AHEAD_S = 5000

IN_THE_FUTURE = ("unshare", "--time", f"--monotonic={AHEAD_S}", "--fork", "--kill-child")


def why_not() -> str:
    """Why a process here cannot have a clock of its own; "" if it can."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*IN_THE_FUTURE, "true"], capture_output=True).returncode
    ):
        return "needs root, and a kernel with time namespaces"
    return ""


@contextmanager
def watchers(link: Link, before: Sequence[str], count: int) -> Iterator[None]:
    """Watchers of so many ranks, which do nothing; `before`: the words before each command."""
    started, ours = [], []
    for rank in range(count):
        memory = os.memfd_create("rank")
        os.ftruncate(memory, MEMORY_BYTES)
        mine, its = socket.socketpair()
        ours.append(mine)
        command = [*before, sys.executable, "-P", "-m", "dinfer.rank.watcher", str(memory), str(its.fileno())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(memory, its.fileno()))
        os.close(memory)
        its.close()
        started.append(process)
        assert process.stdin
        with process.stdin as stdin:
            stdin.write(msgspec.msgpack.encode(link.job_part(rank, launcher=os.getpid())))
    try:
        yield
    finally:
        for one in ours:
            one.close()  # the rank is gone, and so its watcher ends
        for process in started:
            process.wait(DEADLINE_S)


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_another_clock_is_read_at_once_and_as_exactly_as_is_said() -> None:
    link = Link(2)
    try:
        with watchers(link, IN_THE_FUTURE, 2), link.changed:
            assert link.changed.wait_for(lambda: all(state.clock for state in link.ranks), DEADLINE_S)
            known = [state.clock for state in link.ranks]
    finally:
        link.close()
    for clock in known:
        assert clock
        for reading in clock.readings:
            assert abs(reading.offset - AHEAD_S * 10**9) <= reading.error
        at = clock.readings[0].at
        assert abs(clock.to_ours(at) - (at - AHEAD_S * 10**9)) <= clock.error(at, at)


def test_the_clock_of_this_machine_is_not_asked_for() -> None:
    link = Link(1)
    try:
        with watchers(link, (), 1), link.changed:
            assert link.changed.wait_for(lambda: link.ranks[0].heard, DEADLINE_S)
            first = link.ranks[0].heard
            # Some reports later a Beat has been answered, if it ever is.
            assert link.changed.wait_for(lambda: link.ranks[0].heard > first + 1.5, DEADLINE_S)
            assert link.ranks[0].clock is None
    finally:
        link.close()

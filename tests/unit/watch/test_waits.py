"""What a thread waits for in the system: something of this process alone, or somebody else."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from dinfer.watch.probe.stacks import thread_stacks
from dinfer.watch.probe.waits import _waited, waits_for_itself
from tests.support.runs import wait_for

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@contextmanager
def waiting(wait: Callable[[], object], free: Callable[[], object]) -> Iterator[int]:
    """Runs what waits in a thread, whose number this is. `free`: what ends its wait, at the end."""
    thread = threading.Thread(target=wait)
    thread.start()
    try:
        assert thread.native_id
        number = thread.native_id
        wait_for(lambda: _waited(number), "the thread waits")
        yield number
    finally:
        free()
        thread.join(30)


def by_select(one: int) -> None:
    select.select([one], [], [])


def by_poll(one: int) -> None:
    polled = select.poll()
    polled.register(one, select.POLLIN)
    polled.poll()


def by_epoll(one: int) -> None:
    with select.epoll() as polled:
        polled.register(one, select.EPOLLIN)
        polled.poll()


def by_read(one: int) -> None:
    os.read(one, 1)


WAYS = [by_select, by_poll, by_epoll, by_read]


@pytest.mark.parametrize("way", WAYS)
def test_a_pair_of_its_own(way: Callable[[int], None]) -> None:
    mine, other = socket.socketpair()
    with mine, other, waiting(lambda: way(mine.fileno()), lambda: other.send(b"x")) as thread:
        assert waits_for_itself(thread)


@pytest.mark.parametrize("way", WAYS)
def test_a_pipe_of_its_own_and_one_of_another_process(way: Callable[[int], None]) -> None:
    readable, writable = os.pipe()
    with waiting(lambda: way(readable), lambda: os.write(writable, b"x")) as thread:
        assert waits_for_itself(thread)
    os.close(readable)
    os.close(writable)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stdin
        theirs = child.stdout.fileno()
        with waiting(lambda: way(theirs), child.stdin.close) as thread:
            assert not waits_for_itself(thread)


@pytest.mark.parametrize("way", WAYS[:3])
def test_who_listens_serves(way: Callable[[int], None]) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def connect() -> None:
            stack.enter_context(socket.create_connection(server.getsockname()))

        with waiting(lambda: way(server.fileno()), connect) as thread:
            assert not waits_for_itself(thread)


def test_a_connection_within_the_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        with mine, other, waiting(lambda: mine.recv(1), lambda: other.send(b"x")) as thread:
            assert waits_for_itself(thread)


@pytest.mark.parametrize("serves", [False, True])
def test_an_event_loop(serves: bool) -> None:
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) if serves else None
        loops.append((asyncio.get_running_loop(), asyncio.Event()))
        await loops[0][1].wait()
        if server:
            server.close()

    def free() -> None:
        loop, event = loops[0]
        loop.call_soon_threadsafe(event.set)

    with waiting(lambda: asyncio.run(main()), free) as thread:
        wait_for(lambda: bool(loops) and waits_for_itself(thread) != serves, "it is told")


def test_the_stacks_say_it() -> None:
    mine, other = socket.socketpair()
    with mine, other, waiting(lambda: by_select(mine.fileno()), lambda: other.send(b"x")) as number:
        found = {thread.ident: thread.native_id for thread in threading.enumerate()}
        (look,) = (look for look in thread_stacks() if found.get(look["ident"]) == number)
        assert look["for_itself"] == 1


def test_who_computes_waits_for_nothing() -> None:
    assert not waits_for_itself(threading.get_native_id())
    assert not waits_for_itself(2**22 + 1)

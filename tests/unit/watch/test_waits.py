"""What a thread waits for in the system: something of this process alone, or somebody else."""

from __future__ import annotations

import asyncio
import os
import queue
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import zmq

from dinfer.watch.probe.stacks import thread_stacks
from dinfer.watch.probe.waits import _waited, waits_for_itself, waits_for_lock
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


def test_a_lock_is_told_from_other_calls() -> None:
    lock, jobs = threading.Lock(), queue.SimpleQueue[int]()
    lock.acquire()
    ways: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lock.acquire, lock.release),
        (jobs.get, lambda: jobs.put(1)),
    ]
    for wait, free in ways:
        thread = threading.Thread(target=wait)
        thread.start()
        number = thread.native_id
        assert number
        wait_for(partial(waits_for_lock, number), "it waits for a lock")
        free()
        thread.join(30)
    mine, other = socket.socketpair()
    with mine, other, waiting(lambda: mine.recv(1), lambda: other.send(b"x")) as one:
        assert waits_for_lock(one) is False
    assert waits_for_lock(2**30) is None, "there is no such thread"


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


@pytest.mark.parametrize("seconds", [None, 5.0])
def test_the_users_sockets_stay_as_they_are(seconds: float | None) -> None:
    """A default timeout would set them not to block, also those that a C library reads."""
    one, other = socket.socketpair()
    with one, other, socket.create_server(("127.0.0.1", 0)) as server:
        mine = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        with mine, theirs:
            socket.setdefaulttimeout(seconds)
            try:
                with waiting(lambda: os.read(one.fileno(), 1), lambda: other.send(b"x")) as thread:
                    assert waits_for_itself(thread)
                with waiting(lambda: os.read(mine.fileno(), 1), lambda: theirs.send(b"x")) as thread:
                    assert waits_for_itself(thread)
            finally:
                socket.setdefaulttimeout(None)
            assert all(os.get_blocking(each.fileno()) for each in (one, other, mine, theirs, server))


def test_what_nobody_has_foreseen_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(thread: int) -> list[int]:
        raise IndexError(thread)

    monkeypatch.setattr("dinfer.watch.probe.waits._waited", fails)
    assert not waits_for_itself(threading.get_native_id())


@pytest.mark.parametrize("way", WAYS)
def test_a_pair_whose_other_end_is_elsewhere(way: Callable[[int], None]) -> None:
    """As that of `multiprocessing.Pipe` is once the parent has closed the child's end."""
    with ExitStack() as stack:
        mine, other = map(stack.enter_context, socket.socketpair())
        child = stack.enter_context(
            subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=other.fileno(), pass_fds=[other.fileno()])
        )
        other.close()
        assert child.stdin
        with waiting(lambda: way(mine.fileno()), child.stdin.close) as thread:
            assert not waits_for_itself(thread)


def test_a_second_descriptor_of_the_same_end_is_not_the_other_one() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stdin
        again = os.dup(child.stdout.fileno())
        try:
            with waiting(lambda: os.read(again, 1), child.stdin.close) as thread:
                assert not waits_for_itself(thread)
        finally:
            os.close(again)


def test_a_message_of_zmq_comes_from_outside() -> None:
    """Its recv waits for an eventfd, in which a thread puts what has come by the network."""
    with zmq.Context() as context, context.socket(zmq.PULL) as pulls, context.socket(zmq.PUSH) as pushes:
        port = pulls.bind_to_random_port("tcp://127.0.0.1")
        pushes.connect(f"tcp://127.0.0.1:{port}")
        with waiting(pulls.recv, lambda: pushes.send(b"x")) as thread:
            assert not waits_for_itself(thread)


def test_who_computes_waits_for_nothing() -> None:
    assert not waits_for_itself(threading.get_native_id())
    assert not waits_for_itself(2**22 + 1)

"""Control: a rank's end of the line to its session, through the watcher beside it.

A thread takes commands and answers each, slow ones on a thread of their own; reports go out in order. The rank's main
thread may be busy meanwhile, in a notebook cell say.
"""

import itertools
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

import msgspec

from dinfer.engine.board import Board, anonymous_file, map_file
from dinfer.messages import (
    AllStands,
    AskStands,
    Command,
    GetStacks,
    Lanes,
    RankLink,
    RankReport,
    Refused,
    Stand,
    UnknownMessage,
    pack_report,
    unpack_command,
    unpack_request,
)
from dinfer.rank.commands import CommandTable, OnThread, answer, quick, table_of
from dinfer.rank.debugger import undebugged
from dinfer.rank.frames import FrameReader, send_frames
from dinfer.rank.pyspy import let_look
from dinfer.rank.stacks import dump_into, stacks, thread_names
from dinfer.rank.watcher import MEMORY_BYTES, RECORDER_BYTES

CLOSING_S = 10.0

C = TypeVar("C", bound=Command[Any])

Tasks = queue.SimpleQueue[tuple[int, Command[Any]] | None]
"""requests for one thread, by number; None ends it"""


@cache
def _dump_file() -> int:
    """Where this process writes its stacks. Open for good, for one session after the other: a signal may come at any
    time."""
    return anonymous_file(0)


class RankMemory:
    """What a rank and its watcher share: the board, and the events that are recorded. It outlives a control, so that
    the next session finds both."""

    def __init__(self) -> None:
        self.descriptor = anonymous_file(MEMORY_BYTES)
        memory = map_file(self.descriptor, MEMORY_BYTES)
        self.board, self.recorder = Board(memory), memory[-RECORDER_BYTES:]
        self.busy = {thread: threading.Lock() for thread in OnThread}
        """each held while a command of this kind is carried out, whichever session sent it"""

    def close(self) -> None:
        """No further watcher will share it."""
        os.close(self.descriptor)


class Control:
    """Starts the watcher, which connects to the session that `link` names.

    `memory`: that of an earlier control which has been closed; None for new memory. `awaited`: types of commands that
    are no requests: whoever calls `wait_for` gets them, and no reply is sent.
    """

    def __init__(
        self,
        link: RankLink,
        memory: RankMemory | None = None,
        *,
        awaited: tuple[type[Command[Any]], ...] = (),
    ) -> None:
        self._lock = threading.Lock()
        self._closing = False
        self.table: CommandTable = {}
        """the commands that it answers"""
        self._tasks: dict[OnThread, Tasks] = {thread: queue.SimpleQueue() for thread in OnThread}
        self._questions = itertools.count(1)
        self._awaited = awaited
        self._came: dict[object, Command[Any]] = {}
        """awaited commands by type, and answers to `AskStands` by question"""
        self._news = threading.Condition()

        self.memory, dump = memory or RankMemory(), _dump_file()
        self.board, self.recorder_memory = self.memory.board, self.memory.recorder
        self._socket, theirs = socket.socketpair()
        link = msgspec.structs.replace(link, dump=dump if dump_into(dump) else None)
        files = (self.memory.descriptor, theirs.fileno(), dump)
        command = [sys.executable, "-P", "-m", "dinfer.rank.watcher", *map(str, files[:2])]
        with undebugged():
            self.watcher = subprocess.Popen(command, pass_fds=files, stdin=subprocess.PIPE)
        let_look(self.watcher.pid)
        theirs.close()
        assert self.watcher.stdin
        with self.watcher.stdin as pipe:
            pipe.write(msgspec.msgpack.encode(link))
        threading.Thread(target=self._listen, name="control", daemon=True).start()
        for thread in OnThread:
            threading.Thread(
                target=self._work, args=(thread,), name=f"control, {thread}", daemon=True
            ).start()

    def report(self, report: RankReport) -> None:
        """Tell the session something; returns once it is on its way. Raises OSError where the watcher has ended."""
        frames = pack_report(report)
        with self._lock:
            send_frames(self._socket, frames)

    def attach(self, rank: int, lanes: Sequence[str]) -> None:
        """Publish a run of these recorder's lanes, and say where threads stand when asked. Called on the thread that
        is to decode."""
        self.report(Lanes(tuple(lanes), thread_names()))
        decoding = threading.current_thread().name
        self.table = table_of([quick(GetStacks, lambda _: stacks(rank, alone=True, decoding=decoding))])

    def ask_stands(self, timeout: float) -> list[Stand | None]:
        """Where the session knows all ranks to stand; empty where it does not answer in time."""
        question = next(self._questions)
        try:
            self.report(AskStands(question))
            found = self._take(question, timeout)
        except (OSError, TimeoutError):
            return []
        assert isinstance(found, AllStands)
        return list(found.stands)

    def wait_for(self, kind: type[C], timeout: float) -> C:
        """The session's command of this type, which must be one of those `awaited`. Raises TimeoutError."""
        found = self._take(kind, timeout)
        assert isinstance(found, kind)
        return found

    def close(self) -> None:
        """End the line; the watcher publishes what is left and ends by itself. A slow command that is under way is
        carried out to its end; those that wait for it are not."""
        self._closing = True
        with suppress(OSError):  # it may have ended already
            self._socket.shutdown(socket.SHUT_WR)
        self.watcher.wait(CLOSING_S)

    def _take(self, key: object, timeout: float) -> Command[Any]:
        with self._news:
            if not self._news.wait_for(lambda: key in self._came, timeout):
                raise TimeoutError(f"the session has not sent {key} within {timeout:g} s")
            return self._came.pop(key)

    def _listen(self) -> None:
        with self._socket:
            reader = FrameReader(self._socket)
            while (came := reader.read()) is not None:
                for frames in came:
                    self._hear(frames[0])
        for tasks in self._tasks.values():
            tasks.put(None)

    def _hear(self, frame: bytes) -> None:
        request = unpack_request(frame)
        try:
            command = unpack_command(request.command)
        except UnknownMessage as unknown:
            self._send(Refused(request.number, str(unknown)))
            return
        handler = self.table.get(type(command))
        if isinstance(command, (AllStands, *self._awaited)):
            key = command.question if isinstance(command, AllStands) else type(command)
            with self._news:
                self._came[key] = command
                self._news.notify_all()
        elif handler and handler.thread:
            self._tasks[handler.thread].put((request.number, command))
        else:
            self._send(answer(self.table, request.number, command))

    def _work(self, thread: OnThread) -> None:
        while task := self._tasks[thread].get():
            with self.memory.busy[thread]:
                if not self._closing:
                    self._send(answer(self.table, *task))

    def _send(self, report: RankReport) -> None:
        with suppress(OSError):  # nobody is left to hear it
            self.report(report)

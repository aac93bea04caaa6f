"""Control: a rank's end of the line to its session, through the watcher beside it.

A thread takes commands and answers each, slow ones by a thread of their own; reports go out in order. The rank's main
thread may be busy meanwhile, in a notebook cell say.
"""

import contextlib
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from functools import cache
from typing import Any

from dinfer.engine.board import Board, anonymous_file, map_file
from dinfer.engine.lanes import LaneExecutor
from dinfer.messages import Message
from dinfer.rank.commands import Command, CommandTable, answer, lane_commands
from dinfer.rank.debugger import undebugged
from dinfer.rank.pyspy import let_look
from dinfer.rank.stacks import dump_into, stacks, thread_names
from dinfer.rank.watcher import MEMORY_BYTES, RECORDER_BYTES

CLOSING_S = 10.0


@cache
def _dump_file() -> int:
    """Where this process writes its stacks, for one session after the other: open for good, as a signal may come at any
    time."""
    return anonymous_file(0)


class Control:
    """Starts the watcher. `link` says whom to publish to: rank, endpoint, keys, launcher (a process id)."""

    def __init__(self, link: Message) -> None:
        descriptor = anonymous_file(MEMORY_BYTES)
        self._memory = map_file(descriptor, MEMORY_BYTES)
        self.board = Board(self._memory)
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._table: CommandTable = {}
        self._slow: queue.SimpleQueue[tuple[Command, Message] | None] = queue.SimpleQueue()
        self._questions = itertools.count(1)
        self._told: dict[str, Message] = {}
        self._news = threading.Condition()
        command = [
            sys.executable,
            "-m",
            "dinfer.rank.watcher",
            str(descriptor),
            str(theirs.fileno()),
        ]
        dump = _dump_file()
        can_dump = dump_into(dump)
        with undebugged():
            self.watcher = subprocess.Popen(
                command, pass_fds=(descriptor, theirs.fileno(), dump), stdin=subprocess.DEVNULL
            )
        let_look(self.watcher.pid)
        theirs.close()
        os.close(descriptor)
        self._socket.sendall(json.dumps({**link, "dump": dump if can_dump else None}).encode() + b"\n")
        threading.Thread(target=self._listen, name="control", daemon=True).start()
        threading.Thread(target=self._work, name="control, slow commands", daemon=True).start()

    @property
    def recorder_memory(self) -> memoryview:
        return self._memory[len(self._memory) - RECORDER_BYTES :]

    def report(self, kind: str, /, **fields: Any) -> None:
        """Tell the session something; returns once it is on its way."""
        line = json.dumps({"type": kind, **fields}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self._socket.sendall(line)

    def serve(self, table: CommandTable) -> None:
        """Answer these commands from now on."""
        self._table = table

    def attach(self, executor: LaneExecutor, lanes: tuple[str, ...]) -> None:
        """Let commands move this executor; `lanes` are its recorder's. Called on the thread that is to decode."""
        self.report("lanes", lanes=list(lanes), threads=thread_names())
        rank, decoding = executor.rank, threading.current_thread().name
        told = Command(lambda _: stacks(rank, alone=True, decoding=decoding))
        self.serve({**lane_commands(lambda: executor), "stacks": told})

    def ask(self, what: str, timeout: float) -> Message | None:
        """The session's answer to a question of this rank; None where nobody answers in time."""
        key = f"answer {next(self._questions)}"
        try:
            self.report("ask", what=what, key=key)
            return self.told(key, timeout)
        except (OSError, TimeoutError):
            return None

    def told(self, what: str, timeout: float) -> Message:
        """The session's message `what`, once it has come. Raises TimeoutError."""
        with self._news:
            if not self._news.wait_for(lambda: what in self._told, timeout):
                raise TimeoutError(f"the session has not said {what!r} within {timeout:g} s")
            return self._told[what]

    def close(self) -> None:
        """End the line; the watcher publishes what is left and ends by itself."""
        with contextlib.suppress(OSError):  # it may have ended already
            self._socket.shutdown(socket.SHUT_WR)
        self.watcher.wait(CLOSING_S)

    def _listen(self) -> None:
        with self._socket, self._socket.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                command = self._table.get(message["do"])
                if command is None:
                    self._hear(message)
                elif command.slow:
                    self._slow.put((command, message))
                else:
                    self._reply(command, message)
        self._slow.put(None)

    def _work(self) -> None:
        while task := self._slow.get():
            self._reply(*task)

    def _hear(self, message: Message) -> None:
        with self._news:
            self._told[message["do"]] = message
            self._news.notify_all()

    def _reply(self, command: Command, message: Message) -> None:
        with contextlib.suppress(OSError):  # nobody is left to hear it
            self.report("reply", id=message["id"], **answer(command, message))

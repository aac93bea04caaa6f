"""Control: a rank's end of the line to its session, through the watcher beside it.

A thread takes commands (limits, freeze, release, rewind) and answers each; reports go out in order. The rank's
main thread may be busy meanwhile.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from dinfer.engine.board import Board, Stand, anonymous_file, map_file
from dinfer.engine.debugger import undebugged
from dinfer.engine.execution import Execution
from dinfer.engine.watcher import MEMORY_BYTES, RECORDER_BYTES
from dinfer.plan.graph import Channel

Message = dict[str, Any]


class Control:
    """Starts the watcher. `link` says whom to publish to: rank, endpoint, keys, launcher (a process id)."""

    def __init__(self, link: Message) -> None:
        descriptor = anonymous_file(MEMORY_BYTES)
        self._memory = map_file(descriptor, MEMORY_BYTES)
        self.board = Board(self._memory)
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._executor: Execution | None = None
        self._told: dict[str, Message] = {}
        self._news = threading.Condition()
        command = [sys.executable, "-m", "dinfer.engine.watcher", str(descriptor), str(theirs.fileno())]
        with undebugged():
            self.watcher = subprocess.Popen(
                command, pass_fds=(descriptor, theirs.fileno()), stdin=subprocess.DEVNULL
            )
        theirs.close()
        os.close(descriptor)
        self._socket.sendall(json.dumps(link).encode() + b"\n")
        threading.Thread(target=self._listen, name="control", daemon=True).start()

    @property
    def recorder_memory(self) -> memoryview:
        return self._memory[len(self._memory) - RECORDER_BYTES :]

    def report(self, kind: str, **fields: Any) -> None:
        """Tell the session something; returns once it is on its way."""
        line = json.dumps({"type": kind, **fields}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self._socket.sendall(line)

    def attach(self, executor: Execution, lanes: tuple[str, ...]) -> None:
        """Let commands move this executor; `lanes` are its recorder's."""
        self.report("lanes", lanes=list(lanes))
        self._executor = executor

    def told(self, what: str, timeout: float) -> Message:
        """The session's message `what`, once it has come. Raises TimeoutError."""
        with self._news:
            if not self._news.wait_for(lambda: what in self._told, timeout):
                raise TimeoutError(f"the session has not said {what!r} within {timeout:g} s")
            return self._told[what]

    def close(self) -> None:
        """End the line; the watcher publishes what is left and ends by itself."""
        self._socket.shutdown(socket.SHUT_WR)
        self.watcher.wait(10)

    def _listen(self) -> None:
        with self._socket.makefile("rb") as lines:
            for line in lines:
                command = json.loads(line)
                if command["do"] in _COMMANDS:
                    self.report("reply", id=command["id"], **self._answer(command))
                else:
                    with self._news:
                        self._told[command["do"]] = command
                        self._news.notify_all()

    def _answer(self, command: Message) -> Message:
        if self._executor is None:
            return {"error": "this rank has no prompt yet"}
        try:
            return _COMMANDS[command["do"]](self._executor, command)
        except Exception as error:  # the caller gets it as the answer; the line must go on
            return {"error": f"{type(error).__name__}: {error}"}


def stand_fields(stand: Stand) -> Message:
    return {"positions": stand.positions, "started": stand.started, "limits": stand.limits}


def stand_of(message: Message) -> Stand:
    return Stand(tuple(message["positions"]), tuple(map(bool, message["started"])), tuple(message["limits"]))


def _limits(executor: Execution, command: Message) -> Message:
    executor.set_limits(command["limits"])
    return {}


def _freeze(executor: Execution, _: Message) -> Message:
    return stand_fields(executor.freeze())


def _release(executor: Execution, command: Message) -> Message:
    executor.release([Channel(*channel) for channel in command["channels"]])
    return {}


def _rewind(executor: Execution, command: Message) -> Message:
    executor.rewind(command["positions"])
    return {}


_COMMANDS: dict[str, Callable[[Execution, Message], Message]] = {
    "limits": _limits,
    "freeze": _freeze,
    "release": _release,
    "rewind": _rewind,
}

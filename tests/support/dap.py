"""A small client of the Debug Adapter Protocol, as editors are: of debugpy, and of `dinfer dap`. Not a test."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from tests.support.runs import DEADLINE_S, wait_for

Message = dict[str, Any]


class DapTalk:
    """A conversation on two byte streams. Messages are read on a thread of their own, as they come."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self._reader, self._writer = reader, writer
        self._number = 0
        self._came = threading.Condition()
        self._events: list[Message] = []
        self._responses: dict[int, Message] = {}
        self.has_ended = False
        self.transcript: list[Message] = []
        """all messages of both sides"""
        self._thread = threading.Thread(target=self._read, name="dap test client", daemon=True)
        self._thread.start()

    def ask(self, command: str, **arguments: Any) -> Message:
        """One request; the body of its response."""
        return self.answer(self.send(command, **arguments))

    def refused(self, command: str, **arguments: Any) -> str:
        """One request that must fail; the message for the user."""
        response = self._response(self.send(command, **arguments))
        assert not response["success"], response
        assert response["body"]["error"]["showUser"], response
        text: str = response["body"]["error"]["format"]
        return text

    def send(self, command: str, **arguments: Any) -> int:
        """Send a request; its number."""
        self._number += 1
        message = {"seq": self._number, "type": "request", "command": command, "arguments": arguments}
        self.transcript.append(message)
        data = json.dumps(message).encode()
        self._writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(data), data))
        self._writer.flush()
        return self._number

    def answer(self, number: int) -> Message:
        """The body of the response to that request, which must have succeeded."""
        response = self._response(number)
        assert response["success"], response
        body: Message = response.get("body", {})
        return body

    def event(self, name: str) -> Message:
        """The next event of that name; its body."""
        with self._came:
            assert self._came.wait_for(lambda: self._first(name) or self.has_ended, DEADLINE_S), (
                f"no {name} event"
            )
            found = self._first(name)
            assert found, f"the adapter hung up without a {name} event"
            self._events.remove(found)
        body: Message = found.get("body", {})
        return body

    def waiting(self, name: str) -> list[Message]:
        """The bodies of the events of that name that nobody has taken yet."""
        with self._came:
            return [one.get("body", {}) for one in self._events if one["event"] == name]

    def output(self) -> str:
        """All that the debug console shows by now."""
        with self._came:
            said = [one["body"]["output"] for one in self.transcript if one.get("event") == "output"]
        return "".join(said)

    def hang_up(self) -> None:
        self._writer.close()

    def wait_until_ended(self) -> None:
        """Until the other side has hung up."""
        wait_for(lambda: self.has_ended, "the adapter hangs up")

    def _first(self, name: str) -> Message | None:
        return next((one for one in self._events if one["event"] == name), None)

    def _response(self, number: int) -> Message:
        with self._came:
            came = self._came.wait_for(lambda: number in self._responses or self.has_ended, DEADLINE_S)
            assert came, f"no response to request {number}"
            assert number in self._responses, "the debugger hung up"
            return self._responses.pop(number)

    def _read(self) -> None:
        try:
            while message := self._next():
                with self._came:
                    self.transcript.append(message)
                    if message["type"] == "event":
                        self._events.append(message)
                    elif message["type"] == "response":
                        self._responses[message["request_seq"]] = message
                    self._came.notify_all()
        except (OSError, ValueError):  # it was closed on this side
            pass
        with self._came:
            self.has_ended = True
            self._came.notify_all()

    def _next(self) -> Message | None:
        length = 0
        while line := self._reader.readline().strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return json.loads(self._reader.read(length)) if length else None


def connected(port: int) -> socket.socket:
    """Connected to that port of this machine, once somebody listens there."""
    found: list[socket.socket] = []

    def connects() -> bool:
        try:
            found.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        except OSError:
            return False
        return True

    wait_for(connects, f"somebody listens at {port}")
    found[0].settimeout(None)
    return found[0]


class Debugger(DapTalk):
    """Connected to one rank's debugpy, as an "attach" entry of launch.json connects."""

    def __init__(self, port: int) -> None:
        self._socket = connected(port)
        super().__init__(self._socket.makefile("rb"), self._socket.makefile("wb"))

    def attach(self, breakpoints: dict[str, list[int]] | None = None) -> None:
        """The handshake: breakpoints are lines by file; from here on the rank runs."""
        self.ask("initialize", adapterID="dinfer-test", clientID="dinfer-test", pathFormat="path")
        attaching = self.send("attach", justMyCode=False, subProcess=False)
        self.event("initialized")
        for path, lines in (breakpoints or {}).items():
            at = [{"line": line} for line in lines]
            answer = self.ask("setBreakpoints", source={"path": path}, breakpoints=at)
            assert all(point["verified"] for point in answer["breakpoints"]), answer
        self.ask("configurationDone")
        self.answer(attaching)

    def close(self) -> None:
        """Hang up; the rank goes on by itself."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE_S)
        for stream in (self._reader, self._writer, self._socket):  # open streams would keep the socket, too
            stream.close()


class Editor(DapTalk):
    """What VS Code asks of `dinfer dap`, in its order."""

    def start(self, request: str = "launch", *, functions: tuple[str, ...] = (), **arguments: Any) -> Message:
        """Launch or attach, with function breakpoints of these names; the body of the first `stopped` event."""
        self.ask(
            "initialize",
            adapterID="dinfer",
            clientID="test",
            linesStartAt1=True,
            supportsProgressReporting=True,
        )
        asked = self.send(request, **arguments)
        self.answer(asked)
        self.event("initialized")
        if functions:
            self.functions(*functions)
        self.ask("setExceptionBreakpoints", filters=[])
        self.ask("configurationDone")
        return self.event("stopped")

    def functions(self, *names: str) -> list[Message]:
        """Set these function breakpoints, and no others; what has come of each."""
        answer = self.ask("setFunctionBreakpoints", breakpoints=[{"name": name} for name in names])
        found: list[Message] = answer["breakpoints"]
        return found

    def go(self, command: str, **arguments: Any) -> Message:
        """Step, continue or the like; the body of the `stopped` event that follows."""
        self.ask(command, **{"threadId": 1, **arguments})
        return self.event("stopped")

    def frames(self, rank: int = 0) -> list[Message]:
        found: list[Message] = self.ask("stackTrace", threadId=rank + 1)["stackFrames"]
        return found

    def names(self, rank: int = 0) -> list[str]:
        """Those of the frames of a rank, the innermost first."""
        return [frame["name"] for frame in self.frames(rank)]

    def scopes(self, frame: Message) -> dict[str, int]:
        """The references of a frame's scopes, by name."""
        found = self.ask("scopes", frameId=frame["id"])["scopes"]
        return {one["name"]: one["variablesReference"] for one in found}

    def variables(self, reference: int, **page: int | str) -> dict[str, Message]:
        """The variables behind a reference, by name."""
        found = self.ask("variables", variablesReference=reference, **page)["variables"]
        return {one["name"]: one for one in found}

    def say(self, text: str, **more: Any) -> str:
        """What the debug console answers."""
        result: str = self.ask("evaluate", expression=text, context="repl", **more)["result"]
        return result


@contextmanager
def editor_in_process() -> Iterator[Editor]:
    """An editor whose adapter is on a thread of this process, at the other end of two real pipes."""
    from dinfer.dap.adapter import DebugAdapter
    from dinfer.dap.wire import Wire

    (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
    with (
        os.fdopen(to_read, "rb") as reader,
        os.fdopen(from_write, "wb") as writer,
        os.fdopen(from_read, "rb") as own,
    ):

        def serve() -> None:
            DebugAdapter(Wire(reader, writer)).serve()
            writer.close()

        adapter = threading.Thread(target=serve, name="dap adapter")
        adapter.start()
        editor = Editor(own, os.fdopen(to_write, "wb"))
        try:
            yield editor
        finally:
            editor.hang_up()
            editor.wait_until_ended()
            adapter.join()

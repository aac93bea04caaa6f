"""A small client of the Debug Adapter Protocol, which VS Code speaks with debugpy. Not a test."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from tests.support.runs import DEADLINE_S, wait_for

Message = dict[str, Any]


class Debugger:
    """Connected to one rank's debugpy, as an "attach" entry of launch.json connects."""

    def __init__(self, port: int) -> None:
        found: list[socket.socket] = []

        def connects() -> bool:
            try:
                found.append(socket.create_connection(("127.0.0.1", port), timeout=5))
            except OSError:
                return False
            return True

        wait_for(connects, f"debugpy listens at {port}")
        self._socket = found[0]
        self._socket.settimeout(DEADLINE_S)
        self._stream = self._socket.makefile("rb")
        self._number = 0
        self._events: list[Message] = []
        self._responses: dict[int, Message] = {}

    def attach(self, breakpoints: dict[str, list[int]] | None = None) -> None:
        """The handshake: breakpoints are lines by file; from here on the rank runs."""
        self.ask("initialize", adapterID="dinfer-test", clientID="dinfer-test", pathFormat="path")
        attaching = self._send("attach", justMyCode=False, subProcess=False)
        self.event("initialized")
        for path, lines in (breakpoints or {}).items():
            at = [{"line": line} for line in lines]
            answer = self.ask("setBreakpoints", source={"path": path}, breakpoints=at)
            assert all(point["verified"] for point in answer["breakpoints"]), answer
        self.ask("configurationDone")
        self._answer(attaching)

    def ask(self, command: str, **arguments: Any) -> Message:
        """One request; the body of its response."""
        return self._answer(self._send(command, **arguments))

    def event(self, name: str) -> Message:
        """The next event of that name; its body."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := [event for event in self._events if event["event"] == name]):
            assert time.monotonic() < deadline, f"no {name} event"
            self._read()
        self._events.remove(found[0])
        body: Message = found[0].get("body", {})
        return body

    def close(self) -> None:
        """Hang up; the rank goes on by itself."""
        self._stream.close()
        self._socket.close()

    def _send(self, command: str, **arguments: Any) -> int:
        self._number += 1
        message = {"seq": self._number, "type": "request", "command": command, "arguments": arguments}
        data = json.dumps(message).encode()
        self._socket.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(data), data))
        return self._number

    def _answer(self, number: int) -> Message:
        while number not in self._responses:
            self._read()
        response = self._responses.pop(number)
        assert response["success"], response
        body: Message = response.get("body", {})
        return body

    def _read(self) -> None:
        length = 0
        while line := self._stream.readline().strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        assert length, "the debugger hung up"
        message = json.loads(self._stream.read(length))
        if message["type"] == "event":
            self._events.append(message)
        elif message["type"] == "response":
            self._responses[message["request_seq"]] = message

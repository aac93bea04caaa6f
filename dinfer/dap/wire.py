"""Messages of the Debug Adapter Protocol on two byte streams: JSON after a header with its length."""

import json
import threading
from collections.abc import Mapping
from typing import Any, BinaryIO

from dinfer.errors import DinferError, excerpt

DapMessage = dict[str, Any]

MAX_HEADER, MAX_BODY = 1 << 12, 1 << 26
"""bytes of a header line, and of a message"""

HEADERS = ("content-length", "content-type")
"""of the protocol. Whoever sends others, such as those of HTTP, is no client: any web page can send a request here."""


class WireError(DinferError, ValueError):
    """What was read is no message of the protocol."""


class Wire:
    """`send` may be called from any thread; it numbers the messages. `read` is for one thread."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self._reader, self._writer = reader, writer
        self._lock = threading.Lock()
        self._number = 0
        self.is_closed = False
        """whether the client reads no more"""

    def read(self) -> DapMessage | None:
        """The next message; None at the end. Raises WireError."""
        length = self._length()
        if length is None:
            return None
        if not 0 < length <= MAX_BODY:
            raise WireError(f"Content-Length is {length}; it must be from 1 to {MAX_BODY:,} bytes.")
        data = self._reader.read(length)
        if len(data) < length:
            return None
        try:
            message = json.loads(data)
        except ValueError as error:
            raise WireError(f"a message is not JSON: {error}: {excerpt(data)}") from None
        if not isinstance(message, dict):
            raise WireError(f"a message is {excerpt(message)}; it must be a JSON object.")
        return message

    def send(self, message: Mapping[str, Any]) -> None:
        """Write a message. Nothing is written any more once the client has hung up."""
        with self._lock:
            self._number += 1
            data = json.dumps({"seq": self._number, **message}, ensure_ascii=False, default=str).encode()
            try:
                self._writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(data), data))
                self._writer.flush()
            except (OSError, ValueError):  # ValueError: the stream is closed
                self.is_closed = True

    def event(self, name: str, **body: Any) -> None:
        """Write an event."""
        self.send({"type": "event", "event": name, "body": body})

    def _length(self) -> int | None:
        """What the header says; None at the end."""
        length: int | None = None
        while line := self._reader.readline(MAX_HEADER):
            name, _, value = line.decode("ascii", "replace").partition(":")
            name = name.strip().lower()
            if not line.strip():
                if length is not None:
                    return length
            elif name not in HEADERS:
                raise WireError(
                    f"a header is {excerpt(line)}; it must read 'Content-Length: N'. Clients of the Debug Adapter "
                    "Protocol speak so."
                )
            elif name == "content-length":
                if not value.strip().isdecimal() or len(value) > 20:
                    raise WireError(f"Content-Length is {excerpt(value.strip())}; it must be a number.")
                length = int(value)
        return None

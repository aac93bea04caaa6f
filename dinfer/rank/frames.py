"""Messages of several frames over a stream socket, between a rank and the watcher beside it.

A message is its number of frames, their sizes, and their bytes.
"""

import socket
import struct
from collections.abc import Sequence

_COUNT = struct.Struct("<I")
RECV_BYTES = 1 << 18


def send_frames(to: socket.socket, frames: Sequence[bytes]) -> None:
    """Send one message. Raises OSError. Threads that share a socket must take turns."""
    head = struct.pack(f"<I{len(frames)}Q", len(frames), *map(len, frames))
    if sum(map(len, frames)) < RECV_BYTES:
        to.sendall(b"".join([head, *frames]))
    else:  # too many bytes to copy them once more
        for part in (head, *frames):
            to.sendall(part)


class FrameReader:
    """Takes bytes as they come, so that a watcher need not wait for a whole message."""

    def __init__(self, source: socket.socket) -> None:
        self._source = source
        self._unread = bytearray()

    def read(self) -> list[list[bytes]] | None:
        """The messages that one `recv` has completed; None once the other end is gone."""
        try:
            data = self._source.recv(RECV_BYTES)
        except OSError:
            return None
        if not data:
            return None
        self._unread += data
        found = []
        while (message := self._next()) is not None:
            found.append(message)
        return found

    def _next(self) -> list[bytes] | None:
        unread = self._unread
        if len(unread) < _COUNT.size:
            return None
        (count,) = _COUNT.unpack_from(unread)
        at = _COUNT.size + 8 * count
        if len(unread) < at:
            return None
        sizes = struct.unpack_from(f"<{count}Q", unread, _COUNT.size)
        if len(unread) < at + sum(sizes):
            return None
        frames = []
        with memoryview(unread) as view:
            for size in sizes:
                frames.append(bytes(view[at : at + size]))
                at += size
        del unread[:at]
        return frames

"""Precedence: on a slow link blocks travel in pieces, and no piece begins while a hidden state travels the same way.

A hidden state is what the next rank waits for; a block is first needed in decode. Both share this rank's interface,
where a full network gives each message its part: beside two blocks a hidden state would take three times as long.
On a fast link, where that is over at once, a block travels as one.

How fast a link is cannot be told from when a send ends, since buffers of the system take megabytes at once. But a
piece is sent only once its receiver has the last but one, so that the pieces of a block tell.
"""

import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from time import monotonic
from typing import Literal

from torch import Tensor

from dinfer.plan.graph import Channel

Way = Literal["out", "in"]

PIECE_S = 0.003
"""how long a piece is to travel: a hidden state waits for two of these on each lane at most"""

SMALLEST = 32 * 1024
"""bytes of a piece: each is a message of its own, for which both ends have to meet"""

UNDER_WAY = 2
"""pieces that a lane has under way: while one travels, the next is ready"""

PROBE, PROBE_EVERY, PROBE_LEAST = 4, 32, 16 * 1024
"""pieces of a block by which to learn how fast a link is; how many blocks have one such; the least bytes of one"""

LONGEST_S = 1.0
"""seconds after which a hidden state no longer goes first: its peer may be stopped, and the blocks' peers are not"""

_COUNT, _AT = struct.Struct("<I"), 28
"""the number of pieces in a header, in bytes that `header` leaves free; 0 in one that was not sent so"""


class Precedence:
    """What travels from this rank and to it, and how fast; lanes share it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._travelling: dict[Way, list[float]] = {"out": [], "in": []}
        self._speed: dict[Channel, float] = {}
        self._blocks: Counter[Channel] = Counter()

    @contextmanager
    def hidden(self, way: Way) -> Iterator[None]:
        """A hidden state travels."""
        began = monotonic()
        with self._changed:
            self._travelling[way].append(began)
        try:
            yield
        finally:
            with self._changed:
                self._travelling[way].remove(began)
                self._changed.notify_all()

    def give_way(self, way: Way) -> None:
        """Wait while a hidden state travels that way, for LONGEST_S at most."""
        with self._changed:
            while began := self._travelling[way]:
                left = min(began) + LONGEST_S - monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return

    def pieces(self, channel: Channel, nbytes: int) -> int:
        """In how many pieces to send the next block of a channel, by how fast those before have travelled."""
        if channel.communicator != "kv" or nbytes < PROBE_LEAST:
            return 1
        speed, number = self._speed.get(channel), self._blocks[channel]
        self._blocks[channel] += 1
        wanted = ceil(nbytes / max(PIECE_S * speed, SMALLEST)) if speed else 1
        return max(wanted, PROBE) if number % PROBE_EVERY == 0 else wanted

    def sent(self, channel: Channel, nbytes: int, pieces: int, seconds: float) -> None:
        """A block has been sent, in so many seconds since its receiver was ready: all but its last pieces have
        arrived."""
        if pieces > UNDER_WAY:
            self._speed[channel] = nbytes * (1 - UNDER_WAY / pieces) / max(seconds, 1e-9)


def with_pieces(header: bytes, count: int) -> bytes:
    """The packed header, which says in how many pieces its payload comes."""
    return header[:_AT] + _COUNT.pack(count) + header[_AT + _COUNT.size :]


def pieces_in(header: bytes) -> int:
    """In how many pieces a header's payload comes."""
    (count,) = _COUNT.unpack_from(header, _AT)
    return max(1, int(count))


def cut(payload: Tensor, count: int) -> tuple[Tensor, ...]:
    """The payload's bytes, uint8 [nbytes], in so many pieces, the same at both ends."""
    return payload.tensor_split(count)

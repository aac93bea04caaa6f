"""Event: what one op did, as a plain record and as 64 bytes.

Events do not presume dinfer's own engine: chunk, layer and peer may be unknown (None), and `kind` may be a
collective.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from dinfer.plan.ops import Op

KINDS = (
    "embed",
    "layer",
    "norm",
    "send",
    "recv",
    "decode",
    "all_gather",
    "broadcast",
    "all_reduce",
    "barrier",
    "other",
    "check",
    "corrupt",
)
"""stored by their index, so new ones go last. "check": all blocks were checked before decode; "corrupt": a block has
changed, on the wire from `peer` or, without a peer, in memory"""

WHATS = ("", "hidden", "kv", "final", "token")

SIZE = 64

_LAYOUT = struct.Struct("<BBBxiiiiqqqqqi")

_NONE = -1

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Event:
    """Times are nanoseconds on the rank's monotonic clock.

    `ready`: the op was first on its lane and allowed to start. `start`: its inputs were there. `met`: its peer had
    begun as well (for ops without a peer, the same as `start`). `end`: it was done. So `start − ready` is waiting for
    this rank's own data, `met − start` waiting for the peer, `end − met` compute or time on the wire.

    On a GPU, `end` of a computing op is when all its kernels were launched, not when they had run: to know that, the
    recorder would have to wait for the device. A send's `end` is when its payload had left, which includes the wait for
    the kernels that made it.
    """

    rank: int
    lane: str
    kind: str
    ready: int
    start: int
    met: int
    end: int
    what: str = ""
    chunk: int | None = None
    layer: int | None = None
    peer: int | None = None
    tokens: int = 0
    bytes: int = 0
    index: int | None = None

    @property
    def waited(self) -> int:
        """Nanoseconds spent waiting for the peer."""
        return self.met - self.start

    @property
    def busy(self) -> int:
        """Nanoseconds of compute, or on the wire."""
        return self.end - self.met

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def pack_into(self, buffer: memoryview, offset: int, lane: int) -> None:
        """Write the event as `SIZE` bytes, without its rank and lane name, which the reader knows."""
        _LAYOUT.pack_into(
            buffer,
            offset,
            KINDS.index(self.kind) if self.kind in KINDS else KINDS.index("other"),
            WHATS.index(self.what),
            lane,
            _number(self.chunk),
            _number(self.layer),
            _number(self.peer),
            self.tokens,
            self.bytes,
            self.ready,
            self.start,
            self.met,
            self.end,
            _number(self.index),
        )

    @classmethod
    def unpack_from(cls, buffer: Bytes, offset: int, rank: int, lanes: tuple[str, ...]) -> Self:
        kind, what, lane, chunk, layer, peer, tokens, size, ready, start, met, end, index = (
            _LAYOUT.unpack_from(buffer, offset)
        )
        return cls(
            rank=rank,
            lane=lanes[lane],
            kind=KINDS[kind],
            ready=ready,
            start=start,
            met=met,
            end=end,
            what=WHATS[what],
            chunk=_known(chunk),
            layer=_known(layer),
            peer=_known(peer),
            tokens=tokens,
            bytes=size,
            index=_known(index),
        )


def _number(value: int | None) -> int:
    return _NONE if value is None else value


def _known(value: int) -> int | None:
    return None if value == _NONE else value


assert _LAYOUT.size == SIZE


COMPUTE = frozenset({"embed", "layer", "norm", "decode"})

CHECKING = frozenset({"check", "corrupt"})
"""events about blocks, which are not part of prefill"""


class EventLog(Protocol):
    """What writers need of a trace: the events, in the order in which they ended, and a description of the run."""

    @property
    def events(self) -> tuple[Event, ...]: ...

    @property
    def about(self) -> dict[str, Any]: ...


def prefill_events(events: Iterable[Event]) -> Iterator[Event]:
    """The events of prefill, without those of decode and those about blocks."""
    apart = {"decode", *CHECKING}
    return (event for event in events if event.what != "token" and event.kind not in apart)


def event_of(
    op: Op, rank: int, lane: str, index: int, times: tuple[int, int, int, int], nbytes: int
) -> Event:
    """The event of a plan's op that has ended. `times`: ready, start, met and end, as in Event; `index`: the op's
    number on its lane."""
    ready, start, met, end = times
    return Event(
        rank=rank,
        lane=lane,
        kind=op.kind,
        ready=ready,
        start=start,
        met=met,
        end=end,
        what=op.what if op.is_transfer else "",
        chunk=None if op.chunk < 0 else op.chunk,
        layer=None if op.layer < 0 else op.layer,
        peer=op.peer if op.is_transfer else None,
        tokens=op.tokens,
        bytes=nbytes,
        index=index,
    )


def pairs(events: Iterable[Event]) -> list[tuple[Event | None, Event | None]]:
    """The send and the recv of each message of prefill; None for one that is not among the events.

    The nth send of a block on a link belongs to its nth recv: after the run went back, a block travels again.
    """
    sends: dict[tuple[object, ...], list[Event]] = defaultdict(list)
    recvs: dict[tuple[object, ...], list[Event]] = defaultdict(list)
    for event in prefill_events(events):
        if event.peer is None:
            continue
        if event.kind == "send":
            sends[event.rank, event.peer, event.what, event.chunk, event.layer].append(event)
        elif event.kind == "recv":
            recvs[event.peer, event.rank, event.what, event.chunk, event.layer].append(event)
    return [
        (_nth(sends[key], n), _nth(recvs[key], n))
        for key in {**sends, **recvs}
        for n in range(max(len(sends[key]), len(recvs[key])))
    ]


def _nth(events: Sequence[Event], number: int) -> Event | None:
    return events[number] if number < len(events) else None

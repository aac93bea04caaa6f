"""Event: what one op did, as a plain record and as 64 bytes.

Events do not presume dinfer's own engine: chunk, layer and peer may be unknown (None), and `kind` may be a
collective.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from dinfer.plan.ops import Op

KINDS = (
    "embed", "layer", "norm", "send", "recv", "decode", "all_gather", "broadcast", "all_reduce", "barrier", "other",
    "check", "corrupt", "nonfinite", "reduce_scatter", "all_to_all", "reduce", "gather", "scatter",
    "new_group", "init_group",
)  # fmt: skip
"""stored by their index, so new ones go last. "check": all blocks were checked before decode; "corrupt": a block has
changed, on the wire from `peer` or, without a peer, in memory; "nonfinite": there is NaN or Inf in the `what` that an
op made, of that `layer` or, without one, before the first layer of a rank or after the last of all"""

WHATS = ("", "hidden", "kv", "final", "token")

SIZE = 64

_LAYOUT = struct.Struct("<BBBxiiiiqqqqqi")
"""kind, what, lane, chunk, layer, peer, tokens, bytes, ready, start, met, end, index; an unknown number is −1"""

assert _LAYOUT.size == SIZE

Bytes = bytes | bytearray | memoryview

COMPUTE = frozenset({"embed", "layer", "norm", "decode"})

COLLECTIVES = frozenset(
    (
        "all_gather",
        "broadcast",
        "all_reduce",
        "barrier",
        "reduce_scatter",
        "all_to_all",
        "reduce",
        "gather",
        "scatter",
    )
)

TAGGED = frozenset({"gloo", "mpi"})
"""backends whose messages match by tag; others match first in, first out whatever the tag"""

QUEUED = frozenset({"nccl", "rccl", "xccl", "hccl"})
"""backends whose calls return once they are in the queue of a device, where each waits for those before it"""


class Group(NamedTuple):
    """A process group of other people's code: its global ranks in the order of group ranks, and its backend."""

    ranks: tuple[int, ...]
    backend: str = ""


_CELL = re.compile(r"/ipykernel_\d+/\d+\.py$")
"""the file that ipykernel makes up for a notebook's cell"""


def is_cell(file: str) -> bool:
    """Whether it is a notebook's cell, of which there is no file to open."""
    return bool(_CELL.search(file))


def place_of(file: str, line: int) -> str:
    """For example `infer.py:31`; `cell:31` in a notebook's cell."""
    return f"{'cell' if is_cell(file) else file.rpartition('/')[2]}:{line}"


@dataclass(frozen=True, slots=True)
class CallRecord:
    """A recorded call into torch.distributed, beside its event. `group`: the key in the trace's groups; `number`: its
    place on this rank among the messages of its link, or the collectives of its group; None: as counted from the
    events; below 0: it meets no other op. `is_waited`: somebody waits, or has waited, for it; `is_followed`:
    somebody has taken its future, and may act on its end without waiting. `shape`, `dtype`: of the
    tensor, if known; `file`, `line`, `function`: of the user's code that called."""

    group: str
    backend: str = ""
    tag: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    is_async: bool = False
    is_waited: bool = True
    is_followed: bool = False
    number: int | None = None
    file: str = ""
    line: int = 0
    function: str = ""

    @property
    def place(self) -> str:
        """For example `infer.py:31`; empty if the line is unknown."""
        return place_of(self.file, self.line) if self.line else ""

    @property
    def tensor(self) -> str:
        """For example `[128, 2, 64] float32`."""
        shape = f"[{', '.join(map(str, self.shape))}]" if self.shape else ""
        return f"{shape} {self.dtype}".strip()


@dataclass(frozen=True, slots=True)
class Event:
    """Times are nanoseconds on the rank's monotonic clock.

    `ready`: the op was first on its lane and allowed to start. `start`: its inputs were there. `met`: its peer had
    begun as well (for ops without a peer, the same as `start`). `end`: it was done. So `start − ready` is waiting for
    this rank's own data, `met − start` waiting for the peer, `end − met` compute or time on the wire.

    On a GPU, `end` of a computing op is when all its kernels were launched, not when they had run: to know that, the
    recorder would have to wait for the device. A send's `end` is when its payload had left, which includes the wait for
    the kernels that made it.

    `call`: of other people's code, what is known of the call. There `ready` is when it was issued and `start` when the
    caller began to wait; `end` is 0 while it is open.
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
    call: CallRecord | None = None

    @property
    def waited(self) -> int:
        """Nanoseconds spent waiting for the peer."""
        return self.met - self.start

    @property
    def busy(self) -> int:
        """Nanoseconds of compute, or on the wire."""
        return self.end - self.met

    @property
    def name(self) -> str:
        """For example `send kv c3 l5`."""
        return f"{self.kind} {block_text(self.what, self.chunk, self.layer)}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """Plain values; without `call` where there is none."""
        # Its fields are plain, or a record of such: `dataclasses.asdict` would copy each, in twelve times the time.
        values = {name: getattr(self, name) for name in self.__slots__}
        call = values.pop("call")
        if call is not None:
            values["call"] = {name: getattr(call, name) for name in call.__slots__}
        return values

    def pack_into(self, buffer: memoryview, offset: int, lane: int) -> None:
        """Write the event as `SIZE` bytes, without its rank and lane name, which the reader knows."""
        _LAYOUT.pack_into(
            buffer,
            offset,
            KINDS.index(self.kind if self.kind in KINDS else "other"),
            WHATS.index(self.what),
            lane,
            -1 if self.chunk is None else self.chunk,
            -1 if self.layer is None else self.layer,
            -1 if self.peer is None else self.peer,
            self.tokens,
            self.bytes,
            self.ready,
            self.start,
            self.met,
            self.end,
            -1 if self.index is None else self.index,
        )

    @classmethod
    def unpack_from(cls, buffer: Bytes, offset: int, rank: int, lanes: tuple[str, ...]) -> Self:
        kind, what, lane, chunk, layer, peer, tokens, size, ready, start, met, end, index = (
            _LAYOUT.unpack_from(buffer, offset)
        )
        chunk, layer, peer, index = (None if n == -1 else n for n in (chunk, layer, peer, index))
        times = (ready, start, met, end)
        return cls(
            rank, lanes[lane], KINDS[kind], *times, WHATS[what], chunk, layer, peer, tokens, size, index
        )


def block_text(what: str, chunk: int | None, layer: int | None) -> str:
    """What an op is about, as far as it is known, for example `kv c3 l5`."""
    words = [what, f"c{chunk}" * (chunk is not None), f"l{layer}" * (layer is not None)]
    return " ".join(filter(None, words))


def prefill_events(events: Iterable[Event]) -> Iterator[Event]:
    """The events of prefill's ops that have ended, without those of decode and those of checks."""
    apart = ("decode", "check", "corrupt", "nonfinite")
    return (event for event in events if event.end and event.what != "token" and event.kind not in apart)


def event_of(
    op: Op, rank: int, lane: str, index: int, times: tuple[int, int, int, int], nbytes: int
) -> Event:
    """The event of a plan's op that has ended. `times`: ready, start, met and end, as in Event; `index`: the op's
    number on its lane."""
    peer, what = (op.peer, op.what) if op.is_transfer else (None, "")
    chunk, layer = None if op.chunk < 0 else op.chunk, None if op.layer < 0 else op.layer
    return Event(rank, lane, op.kind, *times, what, chunk, layer, peer, op.tokens, nbytes, index)


def pairs(events: Iterable[Event]) -> list[tuple[Event | None, Event | None]]:
    """The send and the recv of each message of prefill; None for one that has not ended, or is not among the events.

    The nth send of a block on a link belongs to its nth recv: after the run went back, a block travels again.
    """
    found: dict[tuple[object, ...], list[Event | None]] = {}
    again: dict[tuple[object, ...], int] = {}
    """by side and block: how often it has travelled before"""
    link: tuple[int | None, int | None]
    for event in events:
        if event.kind not in ("send", "recv") or event.peer is None or event.what == "token" or not event.end:
            continue
        side = int(event.kind == "recv")
        link = (event.peer, event.rank) if side else (event.rank, event.peer)
        key: tuple[object, ...] = (*link, event.what, event.chunk, event.layer)
        pair = found.setdefault(key, [None, None])
        if pair[side] is not None:
            number = again[side, key] = again.get((side, key), 0) + 1
            pair = found.setdefault((*key, number), [None, None])
        pair[side] = event
    return [(send, recv) for send, recv in found.values()]

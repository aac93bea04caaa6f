"""Recorder: writes events into memory that was allocated before. It is always on.

Each lane has a ring of its own, so lanes never wait for one another. The memory may be shared with another process,
which reads it while this one writes, or after this one was killed.
"""

from collections.abc import Sequence
from typing import Self

from dinfer.trace.events import SIZE, Event

_EXTRA = 2
"""slots of a ring beside its `capacity`: one for the counter, so that records stay aligned; one for the event that is
being written, so that it never overwrites one of those that count as held"""


def recorder_size(lanes: int, capacity: int) -> int:
    """How many bytes of memory a recorder with so many lanes and events per lane takes."""
    return lanes * (capacity + _EXTRA) * SIZE


class Recorder:
    """Events of one rank. When a lane's ring is full, its oldest events are overwritten; `lost` counts them.

    A lane must be written by one thread at a time. Readers may be anywhere.
    """

    def __init__(
        self, rank: int, lanes: Sequence[str], capacity: int, memory: memoryview | None = None
    ) -> None:
        self.rank = rank
        self.lanes = tuple(lanes)
        self.capacity = capacity
        self._ring = recorder_size(1, capacity)
        size = self._ring * len(self.lanes)
        self._memory = memoryview(bytearray(size)) if memory is None else memory[:size]
        # Cast views store a number at once. struct.pack_into would set it to 0 first, and a reader could see that.
        self._counts = [self._memory[base : base + 8].cast("q") for base in range(0, size, self._ring)]

    @classmethod
    def over(cls, rank: int, lanes: Sequence[str], memory: memoryview) -> Self:
        """A recorder that uses all of `memory`. The writer and the reader of shared memory must name the same lanes."""
        return cls(rank, lanes, len(memory) // (len(lanes) * SIZE) - _EXTRA, memory)

    def record(self, lane: int, event: Event) -> None:
        count = self._count(lane)
        event.pack_into(self._memory, self._slot(lane, count), lane)
        self._counts[lane][0] = count + 1  # last: a reader sees whole events only

    def clear(self) -> None:
        """Forget all events; for the writer, before its first event in memory that was used before."""
        for count in self._counts:
            count[0] = 0

    def read(self, since: Sequence[int] | None = None) -> tuple[list[Event], list[int]]:
        """The events written after the cursor `since` (a number for each lane), and the new cursor."""
        records, cursor = self.read_records(since)
        return unpack_records(records, self.rank, self.lanes), cursor

    def read_records(self, since: Sequence[int] | None = None) -> tuple[bytes, list[int]]:
        """The same as bytes for `unpack_records`, to be passed on without decoding them."""
        cursor = list(since or [0] * len(self.lanes))
        records = bytearray()
        for lane in range(len(self.lanes)):
            if (count := self._count(lane)) == cursor[lane]:  # the usual case, many times a second
                continue
            first = max(cursor[lane], count - self.capacity)
            copied = bytearray()
            for number in range(first, count):
                offset = self._slot(lane, number)
                copied += self._memory[offset : offset + SIZE]
            # Events that the writer has reached meanwhile may be torn: they count as overwritten.
            torn = max(0, self._count(lane) - self.capacity - first)
            records += copied[torn * SIZE :]
            cursor[lane] = count
        return bytes(records), cursor

    def events(self) -> list[Event]:
        """All events that are not overwritten, by lane and then in the order in which they ended."""
        return self.read()[0]

    @property
    def lost(self) -> int:
        """How many events were overwritten."""
        return sum(max(0, self._count(lane) - self.capacity) for lane in range(len(self.lanes)))

    def _slot(self, lane: int, number: int) -> int:
        """The offset of that lane's event of this number, until a later one overwrites it."""
        return lane * self._ring + SIZE * (1 + number % (self.capacity + 1))

    def _count(self, lane: int) -> int:
        return self._counts[lane][0]


def unpack_records(records: bytes, rank: int, lanes: tuple[str, ...]) -> list[Event]:
    """The events in bytes from `Recorder.read_records`."""
    return [Event.unpack_from(records, offset, rank, lanes) for offset in range(0, len(records), SIZE)]

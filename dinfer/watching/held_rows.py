"""The rows of KV that watched ranks hold: digests, as the probe took them when rows were added to caches."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple, TypeVar

from dinfer.trace.events import place_of
from dinfer.watch.probe.rows import RowsTaken

RowDigests = tuple[int, ...]

MOST_GAP = 1 << 16
"""positions between two rows of one cache"""

MOST_REPEATED = 100
"""findings of one layer"""

T = TypeVar("T")

KV_ROWS = "kv"
"""the name of rows of KV; taps have others"""


class HeldRows(Mapping[int, RowDigests]):
    """The digests of a layer's rows by position, of K and of V or of one tensor, in few bytes: a run of days has many
    rows."""

    def __init__(self) -> None:
        self._base = self._parts = 0
        self._digests, self._held = array("Q"), bytearray()
        self.dropped = 0
        """rows so far from all others that no cache has them there, or of another number of tensors"""

    def put(self, start: int, digests: Sequence[RowDigests]) -> None:
        """Rows from position `start` on; what was there before is replaced."""
        if not self._held:
            self._base, self._parts = start, len(digests[0])
        at, parts = start - self._base, self._parts
        if at < -MOST_GAP or at > len(self._held) + MOST_GAP or any(len(row) != parts for row in digests):
            self.dropped += len(digests)
            return
        if at < 0:
            self._digests[:0], self._held[:0] = array("Q", [0]) * (-at * parts), bytes(-at)
            self._base, at = start, 0
        lacks = at + len(digests) - len(self._held)
        if lacks > 0:
            self._digests.extend([0] * (lacks * parts))
            self._held.extend(bytes(lacks))
        stop = at + len(digests)
        self._digests[at * parts : stop * parts] = array("Q", chain.from_iterable(digests))
        self._held[at:stop] = b"\1" * len(digests)

    def __len__(self) -> int:
        return self._held.count(1)

    def __iter__(self) -> Iterator[int]:
        return (self._base + at for at, is_held in enumerate(self._held) if is_held)

    def __contains__(self, position: object) -> bool:
        at = position - self._base if isinstance(position, int) else -1
        return 0 <= at < len(self._held) and bool(self._held[at])

    def __getitem__(self, position: int) -> RowDigests:
        if position not in self:
            raise KeyError(position)
        at = (position - self._base) * self._parts
        return tuple(self._digests[at : at + self._parts])

    def copy(self) -> "HeldRows":
        """The same, that no later `put` changes."""
        made = HeldRows()
        made._base, made._parts, made.dropped = self._base, self._parts, self.dropped
        made._digests, made._held = self._digests[:], self._held[:]
        return made

    def before(self, position: int) -> "HeldRows":
        """A copy of those before a position."""
        return self._those(lambda at: at < position)

    def since(self, position: int) -> "HeldRows":
        """A copy of those from a position on."""
        return self._those(lambda at: at >= position)

    def _those(self, is_meant: Callable[[int], bool]) -> "HeldRows":
        made = HeldRows()
        for at, row in self.items():
            if is_meant(at):
                made.put(at, [row])
        return made

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for the same rows at the same positions. (What is not held is 0.)"""
        held = self._held.rstrip(b"\0")
        return self._base, bytes(held), self._digests[: len(held) * self._parts].tobytes()

    @property
    def digests(self) -> tuple["array[int]", int]:
        """Of a cache without a gap: the digests, one row after another, and how many a row has."""
        return self._digests, self._parts


class AddedBy(NamedTuple):
    """The code that added rows: such as `infer.py:31`, "" if it is unknown, and its function."""

    line: str = ""
    function: str = ""


class LayerRows(NamedTuple):
    """One layer of a rank's newest cache, of one sequence: its rows, and its findings' words."""

    rows: HeldRows
    repeated: list[tuple[int, int, int | None]]
    """first position, count and chunk of rows that were added a second time"""
    shape: tuple[int, ...]
    starts: dict[int, int | None]
    """by the first position of what was added at a time, its chunk; rows that came one by one count as one piece"""
    adders: dict[int, AddedBy]
    """by the first position, who added the rows from there on"""
    is_paged: bool = False
    """what is before its first row may lie in blocks of another sequence, which has computed it"""

    @property
    def begin(self) -> int:
        """The position of its first row."""
        return next(iter(self.rows), 0)

    def copy(self) -> "LayerRows":
        """The same, that no later rows change."""
        rows, starts, adders = self.rows.copy(), {**self.starts}, {**self.adders}
        return self._replace(rows=rows, repeated=[*self.repeated], starts=starts, adders=adders)

    def since(self, position: int) -> "LayerRows":
        """Of its rows those from a position on."""
        starts = {max(start, position): self.chunk_of(max(start, position)) for start in self.starts}
        return self._replace(rows=self.rows.since(position), starts=starts)

    def before(self, position: int) -> "LayerRows":
        """Of its rows those before a position."""
        starts = {start: chunk for start, chunk in self.starts.items() if start < position}
        return self._replace(rows=self.rows.before(position), starts=starts)

    def pieces(self, position: int) -> list[tuple[int, int]]:
        """What was added at a time, as far as it begins before a position: first row and the end."""
        starts = sorted({*self.starts, max(self.rows) + 1})
        return [(start, stop) for start, stop in pairwise(starts) if start < position]

    def chunk_of(self, position: int) -> int | None:
        return _last_before(self.starts, position, None)

    def added_by(self, position: int) -> AddedBy:
        return _last_before(self.adders, position, AddedBy())


def _last_before(by_start: Mapping[int, T], position: int, otherwise: T) -> T:
    """The value of the last start that is not behind a position."""
    start = max((start for start in by_start if start <= position), default=None)
    return otherwise if start is None else by_start[start]


Layers = dict[tuple[int, int], LayerRows]
"""by layer and sequence of the batch"""


class _Added(NamedTuple):
    """What was added to a layer at a time."""

    start: int = -1
    digests: tuple[RowDigests, ...] = ()
    chunk: int | None = None
    by: AddedBy = AddedBy()


class _Store:
    """A cache's layers."""

    def __init__(self) -> None:
        self.layers = Layers()
        self._before: dict[tuple[int, int], _Added] = {}

    def add(self, one: RowsTaken, layer: int) -> None:
        by = AddedBy(place_of(one.file, one.line), one.function) if one.line else AddedBy()
        for sequence, digests in enumerate(one.digests):
            if not digests:  # rows of another request
                continue
            key = (layer, sequence)
            shape = one.shape[:-2] + one.shape[-1:]
            held = self.layers.setdefault(key, LayerRows(HeldRows(), [], shape, {}, {}, one.is_paged))
            before = self._before.get(key, _Added())
            follows = one.start == before.start + len(before.digests)
            is_new = one.start not in held.rows and len(held.repeated) < MOST_REPEATED
            if digests == before.digests and is_new:
                held.repeated.append((one.start, len(digests), one.chunk))
            if not (follows and len(digests) == len(before.digests) == 1 and one.chunk == before.chunk):
                held.starts[one.start] = one.chunk
            if not (follows and by == before.by):
                held.adders[one.start] = by
            self._before[key] = _Added(one.start, digests, one.chunk, by)
            held.rows.put(one.start, digests)


class LayersSeen:
    """The layers that a rank holds, as its rows come: of the newest cache of transformers, and beside it of what is
    tapped, which is of no cache that is known. Of layers that both have, the one that was used last has it."""

    def __init__(self) -> None:
        self._cache, self._tapped, self._newest = _Store(), _Store(), 0
        self._used = [self._cache, self._tapped]
        """the last behind"""

    def add(self, one: RowsTaken) -> None:
        """The next rows that it has taken; those that are none of KV do not count."""
        if one.name != KV_ROWS or one.layer is None or 0 < one.cache < self._newest:
            return
        if one.cache > self._newest:
            self._newest, self._cache = one.cache, _Store()
        if one.cache:
            self._used = [self._tapped, self._cache]
        else:
            self._used = [self._cache, self._tapped]
        self._used[-1].add(one, one.layer)

    @property
    def layers(self) -> Layers:
        """A copy of what is held now."""
        return {key: held.copy() for store in self._used for key, held in store.layers.items()}


def layers_of(taken: Iterable[RowsTaken]) -> Layers:
    """The layers of the cache that was used last."""
    seen = LayersSeen()
    for one in taken:
        seen.add(one)
    return seen.layers

"""Placement: which rows of a layer's KV lie where others should, told by the digests of the rows alone.

A row that is found elsewhere, in another order or in part, has been computed rightly and put wrongly. What a row holds
that is found nowhere is not named here.
"""

from collections.abc import Sequence
from typing import NamedTuple

RowDigests = tuple[tuple[int, ...], tuple[int, ...]]
"""a token's digests: of K by head, of V by head"""


class Misplaced(NamedTuple):
    """Rows `start` to `stop` (exclusive). `kind`: "repeated" (they repeat rows held before them, from `source` on),
    "stale" (the same for a whole block, which holds an earlier one), "shifted" (they belong to `source` and on),
    "permuted" (among themselves), "swapped" (K for V), "heads" (moved on by `source` heads), "empty" (all zero),
    "extra" (behind the last row, and found nowhere). `tensors`: "K", "V" or "KV"."""

    start: int
    stop: int
    kind: str
    tensors: str = "KV"
    source: int = -1


def misplaced(
    mine: Sequence[RowDigests], wanted: Sequence[RowDigests], empty: int, blocks: Sequence[range] = ()
) -> list[Misplaced]:
    """Name the rows of `mine` that are not those of `wanted`, in order; neighbours of one kind are one finding.

    `empty` is the digest of a row of zeros; `blocks` are the rows that came together. Where their number is right, a
    block is named only if that explains all of it: in a block of other values, single rows may be a neighbour's by
    chance, as K of the first layer is for equal tokens at shifted positions.
    """
    search, found = _Search(mine, wanted, empty), list[Misplaced]()
    for index in range(len(mine)):
        for one in search.name(index):
            before = next((n for n, last in enumerate(found) if _goes_on(last, one)), None)
            if before is None:
                found.append(one)
            else:
                found[before] = found[before]._replace(stop=index + 1)
    found = [_settled(one, blocks) for one in _permuted(sorted(found), blocks)]
    if len(mine) != len(wanted):
        return found
    return [one for one in found if _explains_all(one, found, mine, wanted, blocks)]


class _View:
    """Rows, or their K or V alone, by what they hold."""

    def __init__(self, mine: Sequence[object], wanted: Sequence[object], tensors: str) -> None:
        self._mine, self._wanted, self._tensors = mine, wanted, tensors
        self._shift = 0
        """by how many rows the last one that was found lay off: its neighbour does so most likely"""
        self._held = {row: index for index, row in reversed(list(enumerate(mine)))}
        self._right = {row: index for index, row in reversed(list(enumerate(wanted)))}

    def name(self, index: int) -> list[Misplaced]:
        """Where else this very thing is held before, or should be."""
        row, near = self._mine[index], index - self._shift
        if (
            self._shift
            and near >= 0
            and (self._repeats(index, near) or [row] == self._wanted[near : near + 1])
        ):
            source = near
        else:
            held, source = self._held[row], self._right.get(row, index)
            source = min(held, source) if self._repeats(index, held) else source
        if source == index:
            return []
        self._shift = index - source
        repeats = source < index and self._mine[source] == row
        return [Misplaced(index, index + 1, "repeated" if repeats else "shifted", self._tensors, source)]

    def _repeats(self, index: int, source: int) -> bool:
        """Whether a row is another one again. Rows that should be equal, and have changed alike, are not."""
        held, right = (of[source : source + 1] for of in (self._mine, self._wanted))
        alike = bool(right) and right == self._wanted[index : index + 1] and held != right
        return source != index and held == [self._mine[index]] and not alike


class _Search:
    def __init__(self, mine: Sequence[RowDigests], wanted: Sequence[RowDigests], empty: int) -> None:
        self._mine, self._wanted, self._empty = mine, wanted, empty
        self._whole = _View(mine, wanted, "KV")
        self._parts = [
            _View([row[n] for row in mine], [row[n] for row in wanted], name) for n, name in enumerate("KV")
        ]

    def name(self, index: int) -> list[Misplaced]:
        row = self._mine[index]
        if index < len(self._wanted) and row == self._wanted[index]:
            return []
        if set(row[0] + row[1]) == {self._empty}:
            return [Misplaced(index, index + 1, "empty")]
        if found := self._whole.name(index):
            return found
        if index >= len(self._wanted):
            return [Misplaced(index, index + 1, "extra")]
        found = [one for part in (0, 1) for one in self._inside(index, part)]
        if len(found) == 2 and found[0][2::2] == found[1][2::2]:
            return [found[0]._replace(tensors="KV")]
        return found

    def _inside(self, index: int, part: int) -> list[Misplaced]:
        """K or V of a token: another thing of that token, or of another."""
        held, right = self._mine[index][part], self._wanted[index][part]
        name = "KV"[part]
        if held == right:
            return []
        if held == self._wanted[index][1 - part]:
            return [Misplaced(index, index + 1, "swapped", name)]
        if heads := _rotation(held, right):
            return [Misplaced(index, index + 1, "heads", name, heads)]
        if set(held) == {self._empty}:
            return [Misplaced(index, index + 1, "empty", name)]
        return self._parts[part].name(index)


def _rotation(part: tuple[int, ...], right: tuple[int, ...]) -> int:
    """By how many heads `part` is moved on from `right`, 0 if it is not."""
    return next((n for n in range(1, len(part)) if part == right[-n:] + right[:-n]), 0)


def _goes_on(last: Misplaced, one: Misplaced) -> bool:
    """Whether `one` is the next row of the same finding."""
    if (last.stop, last.kind, last.tensors) != (one.start, one.kind, one.tensors):
        return False
    moved = last.stop - last.start if one.kind in ("repeated", "shifted") else 0
    return one.source == last.source + moved


def _permuted(found: list[Misplaced], blocks: Sequence[range]) -> list[Misplaced]:
    """Findings that only exchange rows of one block are one."""
    for block in blocks:
        for tensors in ("KV", "K", "V"):
            inside = [one for one in found if one.start in block and one.tensors == tensors]
            inside = [one for one in inside if one.kind in ("shifted", "repeated")]
            rows = sorted(row for one in inside for row in range(one.start, one.stop))
            sources = sorted(one.source + n for one in inside for n in range(one.stop - one.start))
            if len(rows) > 1 and rows == sources:
                whole = Misplaced(rows[0], rows[-1] + 1, "permuted", tensors)
                found = sorted([*(one for one in found if one not in inside), whole])
    return found


def _explains_all(
    one: Misplaced,
    found: Sequence[Misplaced],
    mine: Sequence[RowDigests],
    wanted: Sequence[RowDigests],
    blocks: Sequence[range],
) -> bool:
    """Whether no row of its blocks and tensors differs that no finding names."""
    places = [n for block in blocks if one.start < block.stop and one.stop > block.start for n in block]
    for part, name in enumerate("KV"):
        named = {n for other in found if name in other.tensors for n in range(other.start, other.stop)}
        differ = {n for n in places if n < len(mine) and mine[n][part] != wanted[n][part]}
        if name in one.tensors and not differ <= named:
            return False
    return True


def _settled(one: Misplaced, blocks: Sequence[range]) -> Misplaced:
    """A block that holds an earlier one is stale."""
    rows = range(one.start, one.stop)
    if one.kind == "repeated" and rows in blocks and any(one.source == b.start for b in blocks if b != rows):
        return one._replace(kind="stale")
    return one

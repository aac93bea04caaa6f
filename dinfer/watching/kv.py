"""Whose KV is what, in other people's code: from the digests that the probe took of rows as they were added to caches.

Ranks are compared only where they hold the same layer in the same shape and agree on most rows: ranks that split heads
hold other rows by design.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from dinfer.display import Displayable, Table
from dinfer.verdict.completed import OpFinding
from dinfer.watch.probe.rows import RowsTaken

RowDigests = tuple[int, ...]

MOST_GAP = 1 << 16
"""positions between two rows of one cache"""

MOST_REPEATED = 100
"""findings of one layer"""

KV_ROWS = "kv"
"""the name of rows of KV; taps have others"""


class HeldRows:
    """The digests of a layer's rows by position, nine bytes a row: of K and V together, as only equality counts."""

    def __init__(self) -> None:
        self._base = 0
        self._digests, self._held = array("Q"), bytearray()
        self.dropped = 0
        """rows so far from all others that no cache has them there"""

    def put(self, start: int, digests: Sequence[RowDigests]) -> None:
        """Rows from position `start` on; what was there before is replaced."""
        if not self._held:
            self._base = start
        at = start - self._base
        if at < -MOST_GAP or at > len(self._held) + MOST_GAP:
            self.dropped += len(digests)
            return
        if at < 0:
            self._digests[:0], self._held[:0] = array("Q", [0]) * -at, bytes(-at)
            self._base, at = start, 0
        lacks = at + len(digests) - len(self._held)
        if lacks > 0:
            self._digests.extend([0] * lacks)
            self._held.extend(bytes(lacks))
        self._digests[at : at + len(digests)] = array("Q", map(_as_one, digests))
        self._held[at : at + len(digests)] = b"\1" * len(digests)

    def __len__(self) -> int:
        return self._held.count(1)

    def __contains__(self, position: int) -> bool:
        at = position - self._base
        return 0 <= at < len(self._held) and bool(self._held[at])

    def compared(self, other: "HeldRows") -> tuple[int, list[int]]:
        """How many positions both hold, and at which they hold other rows."""
        begin = max(self._base, other._base)
        end = min(self._base + len(self._held), other._base + len(other._held))
        common, differ = 0, []
        for position in range(begin, end):
            at, there = position - self._base, position - other._base
            if self._held[at] and other._held[there]:
                common += 1
                if self._digests[at] != other._digests[there]:
                    differ.append(position)
        return common, differ


def _as_one(digests: RowDigests) -> int:
    found = 0
    for digest in digests:
        found = (found * 0x9E3779B97F4A7C15 + digest) & (2**64 - 1)
    return found


class LayerRows(NamedTuple):
    """One layer of a rank's newest cache, of one sequence: its rows, and its findings' words."""

    rows: HeldRows
    repeated: list[tuple[int, int, int | None]]
    """first position, count and chunk of rows that were added a second time"""
    shape: tuple[int, ...]


Layers = dict[tuple[int, int], LayerRows]
"""by layer and sequence of the batch"""


class WatchedKv(Displayable):
    """What `watch.kv()` returns: how many tokens of which layer each rank holds. `diff()` says what is wrong."""

    def __init__(self, layers: Mapping[int, Layers] | None = None) -> None:
        """`layers`: by rank."""
        self.layers = dict(layers or {})

    def diff(self) -> list[OpFinding]:
        """Rows that were added twice, rows that differ between ranks, and rows that a rank lacks."""
        return [*self._repeated(), *self._between()]

    def table(self) -> Table:
        """Tokens by layer and rank."""
        ranks = sorted(self.layers)
        keys = sorted({key for layers in self.layers.values() for key in layers})
        rows = [
            [layer, sequence, *(_count(self.layers[rank].get((layer, sequence))) for rank in ranks)]
            for layer, sequence in keys
        ]
        return Table(["layer", "sequence", *(f"rank {rank}, tokens" for rank in ranks)], rows)

    def __str__(self) -> str:
        if not any(self.layers.values()):
            return "no rows of KV were seen: transformers' caches are, others by --kv, or dinfer.tap('kv', …)"
        return "\n".join([str(self.table()), *(one.text for one in self.diff())])

    def _repeated(self) -> list[OpFinding]:
        found = []
        for rank, layers in self.layers.items():
            for (layer, _), held in layers.items():
                for start, count, chunk in held.repeated:
                    text = (
                        f"rank {rank} holds {_rows(start, count)} of layer {layer} twice: in K and V they equal the "
                        f"{count} before them"
                    )
                    found.append(OpFinding("rows repeated", (rank,), text, layer, chunk))
        return found

    def _between(self) -> list[OpFinding]:
        found = []
        keys = sorted({key for layers in self.layers.values() for key in layers})
        for key in keys:
            holders = [rank for rank in sorted(self.layers) if key in self.layers[rank]]
            for one, other in combinations(holders, 2):
                a, b = self.layers[one][key], self.layers[other][key]
                if a.repeated or b.repeated:
                    continue  # all later rows are shifted, which that says
                if a.shape != b.shape:
                    continue
                common, differ = a.rows.compared(b.rows)
                if not common or 2 * len(differ) >= common:
                    continue
                if differ:
                    text = (
                        f"ranks {one} and {other} hold other KV in {len(differ)} of {common} rows of layer "
                        f"{key[0]}, the first at token {differ[0]}"
                    )
                    found.append(OpFinding("rows differ", (other, one), text, key[0]))
                if len(a.rows) != len(b.rows):
                    less, more = sorted((one, other), key=lambda rank: len(self.layers[rank][key].rows))
                    text = (
                        f"rank {less} holds {min(len(a.rows), len(b.rows))} rows of layer {key[0]}, rank {more} "
                        f"{max(len(a.rows), len(b.rows))}"
                    )
                    found.append(OpFinding("rows missing", (less, more), text, key[0]))
        return found


def layers_of(taken: Iterable[RowsTaken]) -> Layers:
    """The layers of the cache that was used last."""
    newest = 0
    found: Layers = {}
    before: dict[tuple[int, int], tuple[RowDigests, ...]] = {}
    for one in taken:
        if one.name != KV_ROWS or one.layer is None or one.cache < newest:
            continue
        if one.cache > newest:
            newest, found, before = one.cache, {}, {}
        for sequence, digests in enumerate(one.digests):
            key = (one.layer, sequence)
            held = found.setdefault(key, LayerRows(HeldRows(), [], one.shape[:-2] + one.shape[-1:]))
            is_new = one.start not in held.rows and len(held.repeated) < MOST_REPEATED
            if digests and digests == before.get(key) and is_new:
                held.repeated.append((one.start, len(digests), one.chunk))
            before[key] = digests
            held.rows.put(one.start, digests)
    return found


def _count(held: LayerRows | None) -> str:
    return "–" if held is None else str(len(held.rows))


def _rows(start: int, count: int) -> str:
    return f"row {start}" if count == 1 else f"rows {start}–{start + count - 1}"

"""Whose KV is what, in other people's code: from the digests that the probe took of rows as they were added to caches.

Ranks are compared only where they hold the same layer in the same shape and agree on most rows: ranks that split heads
hold other rows by design.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from dinfer.display import Displayable, Table
from dinfer.verdict.completed import OpFinding
from dinfer.watch.probe.rows import RowsTaken

RowDigests = tuple[int, ...]

KV_ROWS = "kv"
"""the name of rows of KV; taps have others"""


class LayerRows(NamedTuple):
    """One layer of a rank's newest cache, of one sequence: digests by position, and its findings' words."""

    rows: dict[int, RowDigests]
    repeated: list[tuple[int, int, int | None]]
    """first position, count and chunk of rows that were added a second time"""
    shape: tuple[int, ...]


class WatchedKv(Displayable):
    """What `watch.kv()` returns: how many tokens of which layer each rank holds. `diff()` says what is wrong."""

    def __init__(self, taken: Mapping[int, Sequence[RowsTaken]]) -> None:
        self.layers: dict[int, dict[tuple[int, int], LayerRows]] = {
            rank: _layers(rows) for rank, rows in taken.items()
        }
        """by rank, by layer and sequence of the batch"""

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
                common = sorted(a.rows.keys() & b.rows.keys())
                differ = [at for at in common if a.rows[at] != b.rows[at]]
                if a.repeated or b.repeated:
                    continue  # all later rows are shifted, which that says
                if a.shape != b.shape or not common or 2 * len(differ) >= len(common):
                    continue
                if differ:
                    text = (
                        f"ranks {one} and {other} hold other KV in {len(differ)} of {len(common)} rows of layer "
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


def _layers(taken: Sequence[RowsTaken]) -> dict[tuple[int, int], LayerRows]:
    """The layers of the cache that was used last."""
    rows = [one for one in taken if one.name == KV_ROWS and one.layer is not None]
    newest = max((one.cache for one in rows), default=0)
    found: dict[tuple[int, int], LayerRows] = {}
    before: dict[tuple[int, int], tuple[RowDigests, ...]] = defaultdict(tuple)
    for one in rows:
        if one.cache != newest or one.layer is None:
            continue
        for sequence, digests in enumerate(one.digests):
            key = (one.layer, sequence)
            held = found.setdefault(key, LayerRows({}, [], one.shape[:-2] + one.shape[-1:]))
            if digests and digests == before[key] and one.start not in held.rows:
                held.repeated.append((one.start, len(digests), one.chunk))
            before[key] = digests
            held.rows.update(enumerate(digests, one.start))
    return found


def _count(held: LayerRows | None) -> str:
    return "–" if held is None else str(len(held.rows))


def _rows(start: int, count: int) -> str:
    return f"row {start}" if count == 1 else f"rows {start}–{start + count - 1}"

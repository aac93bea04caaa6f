"""Whose KV is what, in other people's code: from the digests that the probe took of rows as they were added to caches.

Ranks are compared only where they hold the same layer in the same shape and agree on most rows: ranks that split heads
hold other rows by design.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from dinfer.display import Displayable, Table
from dinfer.tabular import TableRow, Tabular
from dinfer.verdict.completed import OpFinding
from dinfer.watching.held_rows import LayerRows, Layers


class WatchedKv(Tabular, Displayable):
    """What `watch.kv()` returns: how many tokens of which layer each rank holds. `diff()` says what is wrong."""

    def __init__(self, layers: Mapping[int, Layers] | None = None, *, is_behind: bool = False) -> None:
        """`layers`: by rank; `is_behind`: there are rows that have not been read."""
        self.layers, self.is_behind = dict(layers or {}), is_behind

    def diff(self) -> list[OpFinding]:
        """What is wrong, in the words of a run's diff: rows that are repeated, stale, shifted, permuted, rows of other
        values, rows that a rank lacks. Data-parallel ranks are compared as far as their prompts are the same. What most
        ranks hold of a layer is taken to be right; of two ranks, the one with fewer repetitions, then the first."""
        return [*self._differences[0]]

    @cached_property
    def _differences(self) -> tuple[list[OpFinding], list[str]]:
        if not any(self.layers.values()):
            return [], []
        # It imports torch, which who watches need not have loaded.
        from dinfer.watching.kv_diff import differences

        return differences(self.layers)

    def table(self) -> Table:
        """Tokens by layer and rank."""
        ranks = sorted(self.layers)
        keys = sorted({key for layers in self.layers.values() for key in layers})
        rows = [
            [layer, sequence, *(_count(self.layers[rank].get((layer, sequence))) for rank in ranks)]
            for layer, sequence in keys
        ]
        return Table(["layer", "sequence", *(f"rank {rank}, tokens" for rank in ranks)], rows)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        return self.table()._tabulated()

    def __str__(self) -> str:
        if not any(self.layers.values()):
            return "no rows of KV were seen: transformers' caches are, others by --kv, or dinfer.tap('kv', …)"
        findings, other_prompts = self._differences
        return "\n".join([str(self.table()), *other_prompts, *(one.text for one in findings)])


def _count(held: LayerRows | None) -> str:
    if held is None:
        return "–"
    behind = f" behind {held.begin} shared" if held.is_paged and held.begin else ""
    return f"{len(held.rows)}{behind}"

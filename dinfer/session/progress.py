"""Bars: how far each rank has loaded, while it does."""

from typing import Any

from tqdm.auto import tqdm

from dinfer.cluster.ranks import Ranks
from dinfer.display import Closing


class Bars(Closing):
    """One bar a rank, from what ranks report of their bytes."""

    def __init__(self, line: Ranks, ranks: list[int]) -> None:
        self._line, self._ranks = line, ranks
        self._bars: dict[int, Any] = {}
        for rank in ranks:
            line.ranks[rank].loading = None

    def show(self) -> None:
        """Bring the bars to where the ranks are; a rank that has nothing to load has none."""
        for rank in self._ranks:
            if said := self._line.ranks[rank].loading:
                bar = self._bars.get(rank) or self._bar(rank, said.total)
                bar.n = said.done
                bar.refresh()

    def _bar(self, rank: int, total: int) -> Any:
        self._bars[rank] = bar = tqdm(total=total, desc=f"rank {rank}", unit="B", unit_scale=True)
        return bar

    def close(self) -> None:
        """Show the last, and end them."""
        self.show()
        for bar in self._bars.values():
            bar.close()

"""Progress bars of a checkpoint that ranks load."""

from typing import Any

from tqdm.auto import tqdm

from dinfer.cluster.ranks import Ranks
from dinfer.display import Closing


class Bars(Closing):
    """One bar for each rank that reports bytes."""

    def __init__(self, line: Ranks, ranks: list[int]) -> None:
        self._line, self._ranks = line, ranks
        self._bars: dict[int, Any] = {}
        for rank in ranks:
            line.ranks[rank].loading = None

    def show(self) -> None:
        """Update the bars."""
        for rank in self._ranks:
            if said := self._line.ranks[rank].loading:
                bar = self._bars.get(rank) or self._bar(rank, said.total)
                bar.n = said.done
                bar.refresh()

    def _bar(self, rank: int, total: int) -> Any:
        self._bars[rank] = bar = tqdm(total=total, desc=f"rank {rank}", unit="B", unit_scale=True)
        return bar

    def close(self) -> None:
        """Update the bars a last time, and end them."""
        self.show()
        for bar in self._bars.values():
            bar.close()

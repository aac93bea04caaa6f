"""The watch over what a session's engines do in `%%px` cells: `session.watch()`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinfer.cluster.ranks import Ranks
from dinfer.saved.saved import WriteReport
from dinfer.watching.live import EnginesSource, EnginesWatch
from dinfer.watching.temporary import TemporaryFolder


class RanksWatch:
    """None until it begins. `write` and `show` make its reports and its panel."""

    def __init__(self, ranks: Ranks, write: WriteReport | None, show: Callable[..., Any] | None) -> None:
        self._ranks, self._write, self._show = ranks, write, show
        self._watch: EnginesWatch | None = None
        self._folder, self._compares = Path(), False

    def begin(self, *, compare: bool) -> EnginesWatch:
        """The watch; a new one if there is none yet, or if only now it is to `compare`. Raises NotPossible."""
        if self._watch is None or (compare and not self._compares):
            folder = TemporaryFolder()
            self._ranks.watch(str(folder.path), compare=compare)
            self.close()
            self._watch = EnginesWatch(EnginesSource(folder), self._write, self._show)
            self._folder, self._compares = folder.path, compare
        return self._watch

    def stuck_ranks(self) -> tuple[int, ...]:
        """Ranks whose cells hang."""
        return tuple(self._watch.stuck_ranks()) if self._watch else ()

    @contextmanager
    def recovering(self) -> Iterator[None]:
        """While ranks are freed and started again, the watch says nothing of them."""
        if self._watch:
            self._watch.recovering(ended=False)
        try:
            yield
        finally:
            if self._watch:
                self._watch.recovering(ended=True)

    def began_anew(self) -> None:
        """Ranks were started again: all of them are watched on."""
        if self._watch:
            self._ranks.watch(str(self._folder), compare=self._compares)

    def close(self) -> None:
        """End the watch; the ranks go on recording."""
        if self._watch:
            self._watch.close()

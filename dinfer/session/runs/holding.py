"""Holding: a run that stands is kept standing while it is looked at. A look is many requests, and true of one moment
only."""

from collections.abc import Iterator
from contextlib import contextmanager

from dinfer.session.runs.sight import Sight
from dinfer.session.runs.standing import MOVING

POLL_S = 0.05


class Holding(Sight):
    """Part of a run."""

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait until the run stands, and let no action move it meanwhile. Raises RuntimeError for a run that is over,
        and as `check` does for one that moves and cannot go on."""
        self._settle()
        while not self._held_still():
            self._settle()
        try:
            yield
        finally:
            self._lock.release()

    def _held_still(self) -> bool:
        """Take the lock of a run that stands. Another action may have come first, which then is waited for as any."""
        if not self._lock.acquire(timeout=POLL_S):
            return False
        if self._state() not in MOVING:
            return True
        self._lock.release()
        return False

    def _settle(self) -> None:
        """Wait until nothing moves."""
        while self._state() in MOVING:
            with self._line.changed:
                self._line.changed.wait(POLL_S)
            self.check()
        if self.closed:
            raise RuntimeError(f"this run is over, and its ranks hold its KV no more: {self.closed}")

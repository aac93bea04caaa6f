"""Holding: a run that stands is kept standing while it is looked at, since a look is many requests, and true of one
moment only; a run that moves is halted before its ranks are given to another."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dinfer.session.runs.fleet import RankFailed
from dinfer.session.runs.lent import RunOver, over_text
from dinfer.session.runs.sight import Sight
from dinfer.session.runs.standing import MOVING
from dinfer.session.runs.stepper import NoProgress
from dinfer.session.states import RankRefused

POLL_S = 0.05
END_S = 10.0
"""how long a run that ends waits for what is under way to end first"""


class Holding(Sight):
    """Part of a run."""

    _ending = ""
    """why it is about to be over"""

    def close(self, why: str) -> None:
        """It is over. Its ranks are brought to a stand, as far as they can be, and asked no more; what was seen of them
        last is kept."""
        if self.closed:
            return
        self._ending = why
        try:
            with self.halted(END_S):
                self._line.give_back(why)
                super().close(why)
        finally:
            self._ending = ""

    @contextmanager
    def halted(self, timeout: float = float("inf")) -> Iterator[None]:
        """Stop what is under way, and let no action begin meanwhile. A run that cannot be brought to a stand, since it
        has failed or hangs, is left as it is; who cannot be stopped is waited for so many seconds."""
        deadline = time.monotonic() + timeout
        while not (held := self._lock.acquire(timeout=POLL_S)) and time.monotonic() < deadline:
            self._stop()
        try:
            self._stop()
            yield
        finally:
            if held:
                self._lock.release()

    def _stop(self) -> None:
        if self._state() in MOVING:
            with suppress(RankFailed, RankRefused, NoProgress, TimeoutError):
                self._pause()

    def _pause(self) -> None:
        """Stop the run, or the action under way, at the nearest cut."""
        raise NotImplementedError

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
            raise RunOver(over_text(self.closed))

    def check_looking(self) -> None:
        """Raises RunOver where the run is about to be over, which waits for whoever looks at it."""
        if self._ending:
            raise RunOver(over_text(self._ending))

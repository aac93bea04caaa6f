"""When whoever watches looks again: seldom enough to cost little, and soon where something is about to be told."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_S, SHARE = 0.25, 0.02
"""seconds between looks, and the part of a core that looking may take: a long record is looked at less often"""

SELDOM_S = 2.0
"""seconds after which it is looked at all the same: a hang is to be told within five"""

GLANCE_S, GLANCE_SHARE = 0.1, 0.5
"""as above, where there is news or a verdict is about to be told; whether that is so may be asked as often"""


class Pace:
    """Looks that take turns with rests. What counts of a look is its thread's CPU time: on a busy machine a look lasts
    longer, costs no more, and is not to be put off for that."""

    def __init__(
        self, now: Callable[[], float] = time.monotonic, cpu: Callable[[], float] = time.thread_time
    ) -> None:
        self._now, self._cpu = now, cpu
        self._ended, self._spent = now(), 0.0

    def is_due(self, is_urgent: Callable[[], bool]) -> bool:
        """Whether to look again. `is_urgent`: asked where it makes a difference."""
        since = self._now() - self._ended
        if since >= min(SELDOM_S, max(LOOK_S, self._spent / SHARE)):
            return True
        return since >= self._spent / GLANCE_SHARE and is_urgent()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """While it lasts, somebody looks."""
        began = self._cpu()
        try:
            yield
        finally:
            self._ended, self._spent = self._now(), self._cpu() - began

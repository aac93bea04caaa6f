"""Gates: how lanes wait for what other threads do.

All state that threads share is changed inside `with gate.change()` and waited for with `gate.wait(claim)`. `claim` runs
under the gate's lock; what it returns, unless None, is what `wait` returns, so a lane takes its next op in one atomic act.
"""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Gate(Protocol):
    """What executor and in-process transport need of a gate."""

    def enroll(self, thread: str) -> None:
        """The thread of this name is a lane; to be said before it starts."""

    def leave(self) -> None:
        """The calling thread is no lane any more."""

    def wait(self, claim: Callable[[], T | None], timeout: float | None = None) -> T | None:
        """What `claim` returns as soon as that is not None; None once `timeout` seconds have passed."""

    @contextmanager
    def change(self) -> Iterator[None]:
        """Hold the lock, and wake who waits afterwards."""


class FreeGate:
    """Threads run as the machine lets them."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.RLock())

    def enroll(self, thread: str) -> None:
        pass

    def leave(self) -> None:
        pass

    def wait(self, claim: Callable[[], T | None], timeout: float | None = None) -> T | None:
        result: T | None = None

        def claimed() -> bool:
            nonlocal result
            result = claim()
            return result is not None

        with self._condition:
            self._condition.wait_for(claimed, timeout)
        return result

    @contextmanager
    def change(self) -> Iterator[None]:
        with self._condition:
            yield
            self._condition.notify_all()


class _Waiting:
    def __init__(self, claim: Callable[[], object]) -> None:
        self.claim = claim
        self.result: object = None


class SeededGate:
    """One lane runs at a time, and a seeded draw says which: every interleaving can be tried, and repeated.

    Threads that are not enrolled may look in from outside; they wait as with a FreeGate.
    """

    def __init__(self, seed: int) -> None:
        self._condition = threading.Condition(threading.RLock())
        self._random = random.Random(seed)
        self._lanes: set[str] = set()
        self._waiting: dict[str, _Waiting] = {}

    def enroll(self, thread: str) -> None:
        with self._condition:
            self._lanes.add(thread)

    def leave(self) -> None:
        with self._condition:
            self._lanes.discard(threading.current_thread().name)
            self._hand_over()
            self._condition.notify_all()

    def wait(self, claim: Callable[[], T | None], timeout: float | None = None) -> T | None:
        me = threading.current_thread().name
        if me not in self._lanes:
            return FreeGate.wait(self, claim, timeout)  # type: ignore[arg-type]
        with self._condition:
            mine = self._waiting[me] = _Waiting(claim)
            self._hand_over()
            self._condition.wait_for(lambda: mine.result is not None, timeout)
            self._waiting.pop(me, None)
            return mine.result  # type: ignore[return-value]

    @contextmanager
    def change(self) -> Iterator[None]:
        with self._condition:
            yield
            self._hand_over()
            self._condition.notify_all()

    def stuck(self) -> bool:
        """Whether every lane waits and none of them can go on, whatever the draw. Call it when nobody else changes
        anything: then this is for ever."""
        with self._condition:
            self._hand_over()
            return all(lane in self._waiting and self._waiting[lane].result is None for lane in self._lanes)

    def _hand_over(self) -> None:
        """If no lane is running, draw one of those whose claim succeeds."""
        if len(self._waiting) < len(self._lanes) or any(w.result is not None for w in self._waiting.values()):
            return
        order = sorted(self._waiting)
        self._random.shuffle(order)
        for lane in order:
            waiting = self._waiting[lane]
            waiting.result = waiting.claim()
            if waiting.result is not None:
                self._condition.notify_all()
                return

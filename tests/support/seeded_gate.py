"""A gate that runs one lane at a time, in an order drawn from a seed: for tests of interleavings. Not a test."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from dinfer.transport.gate import Gate

T = TypeVar("T")


class _Waiting:
    """A lane that waits: `drawn` is notified once its claim has succeeded."""

    def __init__(self, claim: Callable[[], object], lock: threading.RLock) -> None:
        self.claim = claim
        self.result: object = None
        self.drawn = threading.Condition(lock)


class SeededGate(Gate):
    """Runs one lane at a time and draws the next from a seed, so that every interleaving can be tried and repeated.

    Threads that are not enrolled wait as at any `Gate`. The order repeats unless what they change depends on time.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._outside = threading.Condition(self._lock)
        self._seed, self._draws = seed, 0
        self._lanes: set[str] = set()
        self._lanes_waiting: dict[str, _Waiting] = {}

    def enroll(self, thread: str) -> None:
        with self._lock:
            self._lanes.add(thread)

    def leave(self) -> None:
        with self.change():
            self._lanes.discard(threading.current_thread().name)

    def wait(self, claim: Callable[[], T | None], timeout: float | None = None) -> T | None:
        me = threading.current_thread().name
        if me not in self._lanes:
            return _claimed(self._outside, claim, timeout)
        with self._lock:
            mine = self._lanes_waiting[me] = _Waiting(claim, self._lock)
            if self._hand_over():
                self._outside.notify_all()
            mine.drawn.wait_for(lambda: mine.result is not None, timeout)
            del self._lanes_waiting[me]
            return mine.result  # type: ignore[return-value]

    @contextmanager
    def change(self) -> Iterator[None]:
        with self._lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    self._hand_over()
                    self._outside.notify_all()

    def stuck(self) -> bool:
        """Whether every lane waits and no claim succeeds: a deadlock, unless a thread outside changes something."""
        with self._lock:
            return self._hand_over()

    def _hand_over(self) -> bool:
        """If no lane runs, draw one whose claim succeeds. Returns True if there is none: all lanes are stuck."""
        if len(self._lanes_waiting) < len(self._lanes) or any(
            w.result is not None for w in self._lanes_waiting.values()
        ):
            return False
        order = sorted(self._lanes_waiting)
        # A draw that found nobody must not count: how often that happens depends on the machine.
        random.Random(f"{self._seed}:{self._draws}").shuffle(order)
        for lane in order:
            waiting = self._lanes_waiting[lane]
            waiting.result = waiting.claim()
            if waiting.result is not None:
                self._draws += 1
                waiting.drawn.notify_all()
                return False
        return True


def _claimed(
    condition: threading.Condition, claim: Callable[[], T | None], timeout: float | None
) -> T | None:
    result: T | None = None

    def claimed() -> bool:
        nonlocal result
        result = claim()
        return result is not None

    with condition:
        condition.wait_for(claimed, timeout)
    return result

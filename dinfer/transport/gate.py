"""Gates: how lanes wait for what other threads do.

All state that threads share is changed inside `with gate.change()` and waited for with `gate.wait(claim)`.
`claim` runs under the gate's lock; what it returns, unless None, is what `wait` returns, so a lane takes its
next op in one atomic act. It may run on any thread, and several times.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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

    def hold(self) -> AbstractContextManager[None]:
        """Hold the lock for a change that nobody waits for: wakes nobody."""

    def change(self) -> AbstractContextManager[None]:
        """Hold the lock, and wake who waits afterwards. May be nested: only the outermost wakes anyone."""


class _Waiting:
    """A thread that waits: `drawn` is notified once its claim has succeeded."""

    def __init__(self, claim: Callable[[], object], lock: threading.RLock) -> None:
        self.claim = claim
        self.result: object = None
        self.error: BaseException | None = None
        self.drawn = threading.Condition(lock)

    def settled(self) -> bool:
        """Claim, unless that has succeeded; whether it has. What the claim raises is for the thread that waits."""
        if self.result is None and self.error is None:
            try:
                self.result = self.claim()
            except BaseException as error:
                self.error = error
        return self.result is not None or self.error is not None


class FreeGate:
    """Threads run as the machine lets them.

    Who changes something looks for those who wait, and wakes only whose claim succeeds: to wake all of a rank's lanes
    at every op would take the interpreter from the one that computes for longer than a GPU's layer takes to launch.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: list[_Waiting] = []
        self._depth = 0

    def enroll(self, thread: str) -> None:
        pass

    def leave(self) -> None:
        pass

    def wait(self, claim: Callable[[], T | None], timeout: float | None = None) -> T | None:
        with self._lock:
            mine = _Waiting(claim, self._lock)
            self._waiting.append(mine)
            try:
                mine.drawn.wait_for(mine.settled, timeout)
            finally:
                self._waiting.remove(mine)
            if mine.error is not None:
                raise mine.error
            return mine.result  # type: ignore[return-value]

    @contextmanager
    def hold(self) -> Iterator[None]:
        with self._lock:
            yield

    @contextmanager
    def change(self) -> Iterator[None]:
        with self._lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    self._wake()

    def _wake(self) -> None:
        # Ctrl-C reaches the main thread only, and must not end a claim half-way: there, let all look for themselves.
        is_main = threading.current_thread() is threading.main_thread()
        for waiting in self._waiting:
            if is_main or waiting.settled():
                waiting.drawn.notify()

"""Gate: the lock of the state that threads share, and how they wait for changes to it.

Threads change shared state inside `with gate.change()` and wait with `gate.wait(claim)`. `claim` runs under the lock,
on any thread and possibly several times; `wait` returns its result once that is not None, so a lane takes its next op
atomically.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class _Waiting:
    """A thread that waits: `woken` is notified once its claim has succeeded."""

    def __init__(self, claim: Callable[[], object], lock: threading.RLock) -> None:
        self.claim = claim
        self.result: object = None
        self.error: BaseException | None = None
        self.woken = threading.Condition(lock)

    def settled(self) -> bool:
        """Try the claim, unless it has succeeded; returns whether it has. The waiting thread raises what it raises."""
        if self.result is None and self.error is None:
            try:
                self.result = self.claim()
            except BaseException as error:  # whoever made the change is not to blame for it
                self.error = error
        return self.result is not None or self.error is not None


class Gate:
    """A thread that changes something tries the claims of those that wait and wakes only those that succeed.

    Waking all of a rank's lanes at every op would take the GIL from the computing lane for longer than a GPU's layer
    takes to launch.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: list[_Waiting] = []
        self._depth = 0

    def enroll(self, thread: str) -> None:
        """Register the thread of this name as a lane, before it starts. Needed by gates of tests and of replays."""

    def leave(self) -> None:
        """Unregister the calling thread."""

    def wait(self, claim: Callable[[], T | None], timeout: float | None = None) -> T | None:
        """Return the result of `claim` once that is not None, or None after `timeout` seconds."""
        with self._lock:
            if (found := claim()) is not None:
                return found
            mine = _Waiting(claim, self._lock)
            self._waiting.append(mine)
            try:
                mine.woken.wait_for(mine.settled, timeout)
            finally:
                self._waiting.remove(mine)
            if mine.error is not None:
                raise mine.error
            return mine.result  # type: ignore[return-value]

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock for a change that no thread waits for; wakes none."""
        with self._lock:
            yield

    @contextmanager
    def change(self) -> Iterator[None]:
        """Hold the lock for a change, then wake threads whose claim succeeds. If nested, the outermost wakes them."""
        with self._lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    # Ctrl-C reaches the main thread only and must not interrupt a claim: from there, wake all to try
                    # their own.
                    is_main = threading.current_thread() is threading.main_thread()
                    for waiting in self._waiting:
                        if is_main or waiting.settled():
                            waiting.woken.notify()

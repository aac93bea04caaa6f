"""Desk: the threads behind a panel. Nothing here knows what an action or a picture is.

No browser callback may wait for ranks, so actions are done, and pictures painted, on threads of their own. Each lives
only while there is something to do: an idle panel, or a closed one, has none.
"""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

PERIOD_S = 0.05


class Action(NamedTuple):
    """Something to do, and the Python call that it is. `asks`: what it returns is the answer to a question."""

    call: str
    do: Callable[[], object]
    asks: bool = False


class Worker:
    """Does one action at a time. At most one waits for its turn: a newer one takes its place."""

    def __init__(self, name: str, on_change: Callable[[], None]) -> None:
        self._name, self._on_change = name, on_change
        self._lock = threading.Lock()
        self._closed = False
        self.current: Action | None = None
        self.waiting: Action | None = None
        self.error = self.answer = ""
        self.done = 0

    def ask(self, action: Action) -> None:
        """Have it done; returns at once. The error and the answer of an action before are taken as read."""
        with self._lock:
            if self._closed:
                return
            self.error = self.answer = ""
            if self.current:
                self.waiting = action
            else:
                self.current = action
                threading.Thread(target=self._work, args=(action,), name=self._name, daemon=True).start()
        self._on_change()

    def forget(self) -> None:
        """Drop the action that waits, and what is shown of those before."""
        with self._lock:
            self.waiting, self.error, self.answer = None, "", ""

    def close(self) -> None:
        """Begin nothing more. An action under way ends by itself, and its thread with it."""
        with self._lock:
            self._closed, self.waiting = True, None

    def _work(self, action: Action | None) -> None:
        while action:
            answer, error = _done(action)
            with self._lock:
                self.error, self.answer, self.done = error, answer, self.done + 1
                # What was asked for before the failure was known may not be wanted any more.
                self.current = action = None if error else self.waiting
                self.waiting = None
            self._on_change()


class Painter:
    """Calls `paint` soon after each `touch`, at most once in `period` seconds, and once more after the last.

    After what took long to paint nothing is painted for `rest` times as long: the kernel stays free.
    """

    def __init__(
        self, paint: Callable[[], None], name: str = "painter", period: float = PERIOD_S, rest: float = 1.0
    ) -> None:
        self._paint, self._name = paint, f"dinfer panel {name}"
        self._period, self._rest = period, rest
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._dirty = False
        self._thread: threading.Thread | None = None

    def touch(self) -> None:
        """There is something new to paint; returns at once."""
        with self._lock:
            self._dirty = True
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()

    def close(self, *, wait: bool = True) -> None:
        """Paint no more; waits for a picture that is being painted, unless that may wait for ranks."""
        self._closing.set()
        with self._lock:
            thread = self._thread
        if wait and thread and thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> None:
        while self._take():
            began = time.monotonic()
            self._paint()
            self._closing.wait(max(self._period, self._rest * (time.monotonic() - began)))

    def _take(self) -> bool:
        """Whether there is something to paint; if not, this thread is over."""
        with self._lock:
            wanted = self._dirty and not self._closing.is_set()
            self._dirty = False
            if not wanted:
                self._thread = None
            return wanted


def _done(action: Action) -> tuple[str, str]:
    """What it has answered, and what has gone wrong."""
    try:
        found = action.do()
    except BaseException as error:  # shown to the user, whatever it is: there is nobody else to catch it
        return "", f"{action.call}: {str(error) or type(error).__name__}"
    return str(found) if action.asks else "", ""

"""Desk: the threads behind a panel. Knows neither actions nor pictures.

No browser callback may wait for ranks, so actions and painting have their own threads. Each runs only while there is
work: an idle or closed panel has none.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from dinfer.severity import Severity


class Want(Protocol):
    """`have`: what the browser has been sent before."""

    @property
    def have(self) -> object: ...


WantT = TypeVar("WantT", bound=Want)


class Action(NamedTuple):
    """Something to do, and the Python call it stands for. `asks`: its result is shown as an answer."""

    call: str
    do: Callable[[], object]
    asks: bool = False


class Worker:
    """Does one action at a time. At most one waits; a newer one replaces it. `error` and `answer` are what the last
    action said, `severity` is how grave that is, and `era` what `now()` was when it began."""

    def __init__(
        self, name: str, on_change: Callable[[], None], now: Callable[[], object] = lambda: None
    ) -> None:
        self._name, self._on_change, self._now = name, on_change, now
        self._lock = threading.Lock()
        self._closed = False
        self.current: Action | None = None
        self.waiting: Action | None = None
        self.error = self.answer = ""
        self.severity, self.era = Severity.NOTE, now()
        self.done = 0

    def ask(self, action: Action) -> None:
        """Do an action, now or next; returns at once. Clears the error and answer of the action before."""
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
        """Drop the waiting action, and the error and answer shown."""
        with self._lock:
            self.waiting, self.error, self.answer = None, "", ""

    def close(self) -> None:
        """Start no more actions. A running action ends by itself, and its thread with it."""
        with self._lock:
            self._closed, self.waiting = True, None

    def _work(self, action: Action | None) -> None:
        while action:
            answer, error, era = "", "", self._now()
            try:
                found: object = action.do()
                answer = str(found) if action.asks else ""
                severity = getattr(found, "severity", Severity.NOTE)
            except BaseException as failure:  # shown to the user: nothing else would report it
                error = f"{action.call}: {str(failure) or type(failure).__name__}"
                severity = getattr(failure, "severity", Severity.ERROR)
            with self._lock:
                self.error, self.answer, self.done = error, answer, self.done + 1
                self.severity, self.era = severity, era
                # An action requested before this one failed may no longer be wanted.
                self.current = action = None if error else self.waiting
                self.waiting = None
            self._on_change()


class Painter:
    """Calls `paint` soon after each `touch`, at most once per `period` seconds, and always after the last.

    After a slow `paint`, it rests `rest` times as long, so that the kernel stays responsive, but no longer than
    `longest` seconds, so that what is shown does not fall behind. An error that `paint` raises goes where errors of
    threads go, once until there is another, and the next touch paints again.
    """

    def __init__(
        self,
        paint: Callable[[], None],
        name: str = "painter",
        period: float = 0.05,
        rest: float = 1.0,
        longest: float = 0.5,
    ) -> None:
        self._paint, self._name = paint, f"dinfer panel {name}"
        self._period, self._rest, self._longest = period, rest, longest
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._dirty = False
        self._thread: threading.Thread | None = None
        self._failure = ""

    def touch(self) -> None:
        """Request painting; returns at once."""
        with self._lock:
            self._dirty = True
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()

    def close(self, *, wait: bool = True) -> None:
        """Stop painting. `wait`: until a `paint` under way has ended, which must not wait for ranks."""
        self._closing.set()
        with self._lock:
            thread = self._thread
        if wait and thread and thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> None:
        while True:
            with self._lock:
                wanted = self._dirty and not self._closing.is_set()
                self._dirty = False
                if not wanted:
                    self._thread = None
                    return
            began = time.monotonic()
            try:
                self._paint()
            except Exception as error:
                self._tell(error)
            rest = min(self._longest, self._rest * (time.monotonic() - began))
            self._closing.wait(max(self._period, rest))

    def _tell(self, error: Exception) -> None:
        failure, self._failure = self._failure, repr(error)
        if failure != self._failure:
            threading.excepthook(threading.ExceptHookArgs([*sys.exc_info(), threading.current_thread()]))


VIEWS = 8
"""the number of browsers that are remembered, the newest"""


class Wants(Generic[WantT]):
    """What browsers want to be sent, by the browser's name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_view: dict[str, WantT] = {}

    def __bool__(self) -> bool:
        return bool(self._by_view)

    def __setitem__(self, view: str, want: WantT) -> None:
        with self._lock:
            keep_newest(self._by_view, view, want)

    def taken(self, now: object) -> Iterator[WantT]:
        """Those that do not `have` what there is now, each taken just before it is to be answered."""
        for view, want in list(self._by_view.items()):
            with self._lock:
                # There may be a newer request, which has touched the painter.
                if want.have == now or self._by_view.get(view) != want:
                    continue
                del self._by_view[view]
            yield want


def keep_newest(found: dict[str, Any], view: str, value: object) -> None:
    """Set the value of a browser, and forget those of browsers that came before the last VIEWS."""
    found.pop(view, None)
    found[view] = value
    while len(found) > VIEWS:
        del found[next(iter(found))]

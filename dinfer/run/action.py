"""What every action on a run has in common, whoever calls it."""

import json
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from dinfer.errors import NotPossible


class Acting:
    """Something on which actions are done, and those who want to know when it may have changed.

    `closed` and `failure` say why no further action is possible, `message` why the last one stopped; `said` are the
    messages that nobody has put down yet, `story` all of them.
    """

    def __init__(self) -> None:
        self.last_call = self.message = self.failure = self.closed = ""
        self.said: list[str] = []
        self.story: list[str] = []
        self._listeners: list[Callable[[], None]] = []
        self._seen: object = None
        self._broken: list[Callable[[], None]] = []
        """those whose errors have been told"""
        self._lock = threading.RLock()
        """held by an action while it is under way"""

    def check(self) -> None:
        """Raises where it cannot go on."""
        raise NotImplementedError

    def look(self) -> None:
        """Take in what has been said meanwhile."""
        raise NotImplementedError

    def interrupted(self) -> None:
        """A keyboard interrupt has broken an action off."""
        raise NotImplementedError

    def begin_action(self, call: str) -> None:
        """Raises RuntimeError for what is over, and as `check` does."""
        self.last_call = call
        if self.closed:
            raise NotPossible(f"this run is over: {self.closed}")
        self.check()
        self.message = ""

    def say(self, message: str) -> None:
        """Why the last action stopped, also for the log."""
        self.message = message
        self.said.append(message)
        self.story.append(message)

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback()` called, on any thread, whenever something may have changed; what is returned ends that."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback) if callback in self._listeners else None

    def tell(self) -> None:
        """Call those who asked to be told of changes."""
        for callback in list(self._listeners):
            try:
                callback()
            except Exception as error:  # a listener's mistake is not the run's, nor the other listeners'
                self._note_broken(callback, error)

    def _note_broken(self, callback: Callable[[], None], error: Exception) -> None:
        if callback not in self._broken:
            self._broken.append(callback)
            self.said.append(f"{callback!r}, given to run.on_change, raised {error!r}; told once")

    def tell_of_news(self, look: Callable[[], object]) -> None:
        """Call them where what `look()` gives is not what it gave the last time: at rest, nobody is told anything."""
        seen = look() if self._listeners else None
        if seen != self._seen:
            self._seen = seen
            self.tell()

    def fail(self, why: str) -> None:
        """It cannot go on, until it is begun anew."""
        self.failure = f"{self.failure}\n{why}".strip()
        self.tell()

    def close(self, why: str) -> None:
        """It is over: another one has taken its place, or the session has ended."""
        self.closed = self.closed or why
        self.tell()


P = ParamSpec("P")

T = TypeVar("T")

R = TypeVar("R", bound=Acting)


def action(method: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    """An action is remembered as its user wrote it, refused on a run that is over, and leaves the run paused at a cut
    where a keyboard interrupt breaks it off."""

    @wraps(method)
    def called(run: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        run.begin_action(_text(method.__name__, args, kwargs))
        try:
            return method(run, *args, **kwargs)
        except KeyboardInterrupt:
            run.interrupted()
            raise
        finally:
            run.tell()

    return called


def _text(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    parts = [*map(_written, args), *(f"{key}={_written(value)}" for key, value in kwargs.items())]
    return f"run.{name}({', '.join(parts)})"


def _written(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)

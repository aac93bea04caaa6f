"""What a user has done, newest last, and how to undo it; and calls as their users wrote them."""

import json
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from dinfer.display import DisplayableText

MOST = 50
"""how many actions are kept"""


class UndoableCall(NamedTuple):
    """`undo()` undoes the call, and says in words what that did."""

    call: str
    undo: Callable[[], str]


class History:
    """The last MOST actions that can be undone. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: deque[UndoableCall] = deque(maxlen=MOST)
        self._before = "there is no earlier action"
        """why there is nothing before the first of them"""

    def add(self, call: str, undo: Callable[[], str]) -> None:
        """An action is done, or has begun."""
        with self._lock:
            if len(self._calls) == MOST:
                self._before = f"only the last {MOST} actions are kept"
            self._calls.append(UndoableCall(call, undo))

    @property
    def last(self) -> str:
        """The call that `undo` would undo; "" where there is none."""
        with self._lock:
            return self._calls[-1].call if self._calls else ""

    def forget(self, why: str) -> None:
        """No action until now can be undone any more."""
        with self._lock:
            self._calls.clear()
            self._before = why

    def undo(self) -> DisplayableText:
        """Undo the last action; what that did. The action stays the last one if its undoing raises."""
        with self._lock:
            last = self._calls[-1] if self._calls else None
            if last is None:
                return DisplayableText(f"nothing to undo: {self._before}")
        did = last.undo()
        with self._lock:
            if last in self._calls:
                self._calls.remove(last)
        return DisplayableText(f"undid {last.call}: {did}")


def call_text(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], of: str = "run") -> str:
    """The call as its user wrote it, for example `run.step("layer", n=2)`; without functions, which have no text.
    An object whose repr is no call says in `call_name` how to come by it."""

    def written(value: object) -> str:
        if isinstance(value, str):
            return json.dumps(value, ensure_ascii=False)
        written_as: str = getattr(value, "call_name", "") or repr(value)
        return written_as

    named = {key: value for key, value in kwargs.items() if not callable(value)}
    parts = [written(one) for one in args if not callable(one)]
    parts += [f"{key}={written(value)}" for key, value in named.items()]
    return f"{of}.{name}({', '.join(parts)})"

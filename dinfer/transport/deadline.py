"""Deadlines for calls that wait for other ranks in the transport, where a wait cannot be interrupted.

Such a call runs on its own thread. Past its deadline the caller gets an error while the call continues; the same call
made again waits for it, so that a cell can be repeated once the other ranks have made the call.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from dinfer.errors import DinferError


class StillWaiting(DinferError, RuntimeError):
    """A call has not ended within its deadline. It can be repeated."""


class Deadline:
    """The deadline, `seconds`, of one rank's collective calls, of which at most one is under way. None: no deadline."""

    def __init__(self, rank: int, seconds: float | None) -> None:
        self._rank, self.seconds = rank, seconds
        self._pending: tuple[str, Future[Any]] | None = None

    def run(self, name: str, call: Callable[[], Any]) -> Any:
        """Run the call and return its result. Raises StillWaiting past the deadline, and what the call raises."""
        if self.seconds is None:
            return call()
        if self._pending is None:
            future: Future[Any] = Future()
            self._pending = name, future
            threading.Thread(target=_settle, args=(future, call), name=name, daemon=True).start()
        pending, future = self._pending
        if pending != name:
            raise StillWaiting(
                f"rank {self._rank} is still in {pending}, which waits for other ranks: call it on the ranks that have "
                "not called it yet, then repeat it here."
            )
        if not wait([future], self.seconds).done:
            raise StillWaiting(
                f"rank {self._rank}: {name} has waited {self.seconds:g} s for the other ranks. All ranks must call "
                "it: call it on the others, then repeat it here."
            )
        self._pending = None
        return future.result()


def _settle(future: "Future[Any]", call: Callable[[], Any]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # whatever it is, it is raised in the thread that waits for the call
        future.set_exception(error)

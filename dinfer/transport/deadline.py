"""Deadlines for calls that wait for other ranks in the transport, where a wait cannot be interrupted.

Such a call runs on its own thread. Past its deadline the caller gets an error while the call continues; the same call
made again waits for it, so that a cell can be repeated once the other ranks have made the call.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
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
            self._pending = name, _started(name, call)
        pending, future = self._pending
        if pending != name:
            raise StillWaiting(
                f"rank {self._rank} is still in {pending}, which waits for other ranks: call it on the ranks that have "
                "not called it yet, then repeat it here."
            )
        try:
            result = future.result(self.seconds)
        except TimeoutError:
            if not future.done():
                raise StillWaiting(
                    f"rank {self._rank}: {name} has waited {self.seconds:g} s for the other ranks. All ranks must call "
                    "it: call it on the others, then repeat it here."
                ) from None
            self._pending = None
            raise
        except BaseException:
            if future.done():
                self._pending = None
            raise
        self._pending = None
        return result


def _started(name: str, call: Callable[[], Any]) -> "Future[Any]":
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised in the thread that waits for the call
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future

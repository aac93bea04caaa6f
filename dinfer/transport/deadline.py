"""Deadlines for calls that wait for other ranks inside the transport, which itself cannot be told to stop.

Such a call runs on a thread of its own. Past its deadline the caller gets an error, while the call stays under way: the
same call made again goes on waiting for it, so that a cell can be repeated once the other ranks have come.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from typing import Any

from dinfer.errors import DinferError


class StillWaiting(DinferError, RuntimeError):
    """A call has not ended within its deadline; it can be repeated."""


class Deadline:
    """For the collective calls of one rank, of which at most one is under way."""

    def __init__(self, rank: int, seconds: float | None) -> None:
        self._rank, self.seconds = rank, seconds
        self._pending: tuple[str, Future[Any]] | None = None

    def run(self, name: str, call: Callable[[], Any]) -> Any:
        """The call's result. Raises StillWaiting, and whatever the call raises."""
        if self.seconds is None:
            return call()
        if self._pending is None:
            self._pending = name, _started(name, call)
        pending, future = self._pending
        if pending != name:
            raise StillWaiting(
                f"rank {self._rank} is still in {pending}, which waits for other ranks: call that on the ranks that "
                "have not called it yet, then repeat it here."
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
        except BaseException as error:  # handed to whoever waits for the call
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future

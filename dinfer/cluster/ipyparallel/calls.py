"""Calls of functions on engines, by name, with results by rank. Never waits for an engine that has ended."""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, wait
from typing import Any

from dinfer.cluster.ipyparallel.errors import RankError, RankGone, RankSilent

_submitting = threading.Lock()
"""only one thread at a time may use ipyparallel's sockets"""


class Calls:
    """A call in flight on some ranks. `names`: the ranks as messages name them."""

    def __init__(self, futures: Mapping[int, "Future[Any]"], names: Mapping[int, str]) -> None:
        self._futures = dict(futures)
        self._names = names

    def done(self) -> bool:
        """Whether every rank has answered or ended."""
        return all(future.done() for future in self._futures.values())

    def result(self, timeout: float | None = None, check: bool = True) -> list[Any]:
        """The results in the order of ranks, after at most `timeout` seconds.

        With `check`, the first rank that fails, ends or is late raises at once; otherwise its RankError is its result.
        """
        wait(
            self._futures.values(),
            timeout=timeout,
            return_when=FIRST_EXCEPTION if check else ALL_COMPLETED,
        )
        answers = {rank: self._answer(rank, timeout) for rank in self._futures}
        failed = [answer for answer in answers.values() if isinstance(answer, RankError)]
        if check and failed:
            raise min(failed, key=lambda error: (isinstance(error, RankSilent), error.rank))
        return list(answers.values())

    def _answer(self, rank: int, timeout: float | None) -> Any:
        """The rank's result, or its RankError."""
        future, name = self._futures[rank], self._names[rank]
        if not future.done():
            return RankSilent(rank, f"{name} has not answered within {timeout or 0:g} s.")
        error = future.exception()
        return future.result() if error is None else as_rank_error(rank, name, error)


def as_rank_error(rank: int, name: str, error: BaseException) -> RankError:
    """An engine's error as one line, with its traceback."""
    if isinstance(error, RankError):
        return error
    kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
    if kind == "EngineError":  # so ipyparallel calls an engine that ended during a call
        return RankGone(rank, f"{name} ended during a call.")
    return RankError(rank, f"{name}: {kind}: {text}", str(getattr(error, "traceback", "") or ""))


def submit(client: Any, engine_id: int, expression: str, rank: int, name: str) -> "Future[Any]":
    """Evaluate an expression on one engine. It is sent as text, since pickled code depends on the Python version."""
    with _submitting:
        if engine_id in client.ids:
            try:
                future: Future[Any] = client[engine_id].apply_async(eval, expression)
                return future
            except (IndexError, KeyError):
                pass  # it ended just now
    gone: Future[Any] = Future()
    gone.set_exception(RankGone(rank, f"{name} has ended."))
    return gone


def call_expression(function: str, args: Sequence[Any]) -> str:
    """A call of `module:function` as an expression; `args` must survive JSON. Raises ValueError, TypeError."""
    module, colon, attribute = function.partition(":")
    if not (colon and all(part.isidentifier() for part in [*module.split("."), attribute])):
        raise ValueError(
            f"function is {function!r}; it must be module:function, such as dinfer.model.memory:free."
        )
    text = json.dumps(list(args))
    return (
        f"__import__('importlib').import_module({module!r}).{attribute}(*__import__('json').loads({text!r}))"
    )


def source_expression(source: str, function: str) -> str:
    """An expression that calls a function without arguments, given its source, and defines no names."""
    return f"(lambda names: (exec({source!r}, names), names[{function!r}]())[1])({{}})"


def wait_until(condition: Any, timeout: float) -> bool:
    """Wait for `condition()`; returns whether it became true within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True

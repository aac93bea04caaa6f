"""Calls of functions on engines, by name, with results by rank. Never waits for an engine that has ended."""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, wait
from typing import Any, Literal

from dinfer.cluster.ipyparallel.errors import RankError, RankGone, RankSilent

_submitting = threading.Lock()
"""only one thread at a time may use ipyparallel's sockets"""


EngineCondition = Literal["runs", "stopped", "gone", "unknown"]
"""of an engine's process"""

_SILENT: dict[EngineCondition, str] = {
    "runs": ": it is busy, most likely with a %%px cell. Wait for that cell, or interrupt it; session.recover() "
    "replaces the rank",
    "stopped": ": its process is stopped. `kill -CONT` with its pid lets it go on; session.recover() replaces the rank",
    "gone": ": its process has ended. session.recover() replaces the rank",
    "unknown": "",
}

_GIVEN_UP: dict[EngineCondition, str] = {
    "runs": "has lost its connection to the cluster{during}, though its process runs",
    "stopped": "is stopped (by SIGSTOP or a debugger), and so its cluster has given it up{during}",
    "gone": "ended{during}",
    "unknown": "ended{during}",
}


def _given_up(name: str, condition: EngineCondition, during: str) -> str:
    """That the cluster no longer has an engine, and why. `during`: when, if that is known."""
    if not during and condition in ("gone", "unknown"):
        return f"{name} has ended. session.recover() replaces the rank."
    return f"{name} {_GIVEN_UP[condition].format(during=during)}. session.recover() replaces the rank."


class Calls:
    """A call in flight on some ranks. `names`: the ranks as messages name them; `condition`: by rank, what its process
    does, asked only where there is no answer."""

    def __init__(
        self,
        futures: Mapping[int, "Future[Any]"],
        names: Mapping[int, str],
        condition: Callable[[int], EngineCondition] = lambda _: "unknown",
    ) -> None:
        self._futures = dict(futures)
        self._names = names
        self._condition = condition

    def done(self) -> bool:
        """Whether every rank has answered or ended."""
        return all(future.done() for future in self._futures.values())

    def result(self, timeout: float | None = None, check: bool = True) -> list[Any]:
        """The results in the order of ranks, after at most `timeout` seconds.

        With `check`, the first rank that fails, ends or is late raises at once; otherwise its RankError is its result.
        """
        until = FIRST_EXCEPTION if check else ALL_COMPLETED
        wait(self._futures.values(), timeout=timeout, return_when=until)
        errors = {rank: error for rank in self._futures if (error := self._error(rank, timeout))}
        if check and errors:
            raise min(errors.values(), key=lambda error: (isinstance(error, RankSilent), error.rank))
        return [errors.get(rank) or future.result() for rank, future in self._futures.items()]

    def _error(self, rank: int, timeout: float | None) -> RankError | None:
        future, name = self._futures[rank], self._names[rank]
        if not future.done():
            why = _SILENT[self._condition(rank)]
            return RankSilent(rank, f"{name} has not answered within {timeout or 0:g} s{why}.")
        error = future.exception()
        if error is None or isinstance(error, RankError):
            return error
        kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        # So ipyparallel calls an engine whose heartbeat it has not heard during a call.
        if kind == "EngineError":
            return RankGone(rank, _given_up(name, self._condition(rank), " during a call"))
        return RankError(rank, f"{name}: {kind}: {text}", str(getattr(error, "traceback", "") or ""))


def evaluate(
    client: Any,
    expression: str,
    engines: Mapping[int, int | None],
    names: Mapping[int, str],
    condition: Callable[[int], EngineCondition] = lambda _: "unknown",
) -> Calls:
    """Evaluate an expression on engines, given by rank: their ids, None for one that has ended. It is sent as text,
    since pickled code depends on the Python version."""
    futures: dict[int, Future[Any]] = {}
    for rank, engine_id in engines.items():
        with _submitting:
            if engine_id in client.ids:
                try:
                    futures[rank] = client[engine_id].apply_async(eval, expression)
                    continue
                except (IndexError, KeyError):
                    pass  # it ended just now
        futures[rank] = Future()
        futures[rank].set_exception(RankGone(rank, _given_up(names[rank], condition(rank), "")))
    return Calls(futures, names, condition)


def call_expression(function: str, args: Sequence[Any]) -> str:
    """A call of `module:function` as an expression; `args` must survive JSON. Raises ValueError, TypeError."""
    module, colon, attribute = function.partition(":")
    if not (colon and all(part.isidentifier() for part in [*module.split("."), attribute])):
        raise ValueError(
            f"function is {function!r}; it must be module:function, such as dinfer.model.memory:free."
        )
    loaded = f"__import__('json').loads({json.dumps(list(args))!r})"
    return f"__import__('importlib').import_module({module!r}).{attribute}(*{loaded})"


def wait_until(condition: Callable[[], bool], timeout: float) -> None:
    """Return once `condition()` holds, or after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)

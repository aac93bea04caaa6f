"""Actions on a run: one after another, whoever calls them; and everybody who wants to hear when the run changes."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from dinfer.cluster.lease import RunOver, over_text
from dinfer.errors import NotPossible
from dinfer.run.failure import RankFailed
from dinfer.run.log import LoggedCall
from dinfer.run.state import MOVING, RunState
from dinfer.run.stepper import NoProgress

POLL_S = 0.05


class Actions:
    """`lock`: held by the action that moves the run. `check()` raises where the run cannot go on; `interrupted()` is
    called after a keyboard interrupt."""

    def __init__(self, state: RunState, check: Callable[[], None], interrupted: Callable[[], None]) -> None:
        self._state, self._check, self._interrupted = state, check, interrupted
        self.lock = threading.RLock()
        self._listeners: list[Callable[[], None]] = []
        self._seen: object = None
        self._broken: list[Callable[[], None]] = []  # listeners whose errors are logged already

    # -- who may move the run

    @contextmanager
    def taken(self, call: str, *, alone: bool = True) -> Iterator[LoggedCall]:
        """An action is under way: no other begins until it ends, unless `alone` is False. Raises NotPossible for a run
        that is over, and as `check` does."""
        made = self.begin(call)
        try:
            self._check()
            self._state.replace_message()
            with self.lock if alone else nullcontext():
                yield made
        except KeyboardInterrupt:
            self._interrupted()
            raise
        except Exception as error:
            made.error, made.broke = str(error).partition("\n")[0], isinstance(error, RankFailed | NoProgress)
            raise
        finally:
            made.after = self._state.cut_now()
            self.tell()

    def begin(self, call: str) -> LoggedCall:
        """Log the call as its user wrote it. Raises NotPossible for a run that is over."""
        if self._state.closed:
            self._state.last_call = call
            raise NotPossible(f"this run is over: {self._state.closed}")
        return self._state.note_call(call)

    @contextmanager
    def halted(self, stop: Callable[[], None], timeout: float = float("inf")) -> Iterator[None]:
        """Stop what is under way by `stop()`, and let no action begin meanwhile. After `timeout` seconds the action
        that could not be stopped is no longer waited for."""
        deadline = time.monotonic() + timeout
        while not (held := self.lock.acquire(timeout=POLL_S)) and time.monotonic() < deadline:
            stop()
        try:
            stop()
            yield
        finally:
            if held:
                self.lock.release()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait until the run stands still, and let no action move it meanwhile. Raises RunOver for a run that is over,
        and as `check` does for one that moves and cannot go on."""
        while True:
            self.settle()
            if self.lock.acquire(timeout=POLL_S):
                if not self._state.is_doing(MOVING):
                    break
                self.lock.release()  # another action has begun since
        try:
            yield
        finally:
            self.lock.release()

    def settle(self) -> None:
        """Wait until the run stands still. Raises as `hold` does."""
        while self._state.is_doing(MOVING, POLL_S):
            self._check()
        if self._state.closed:
            raise RunOver(over_text(self._state.closed))

    def check_looking(self) -> None:
        """Raises RunOver while `close()` waits for the caller to finish."""
        if self._state.ending:
            raise RunOver(over_text(self._state.ending))

    # -- who hears of changes

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback()`, on any thread, whenever the run may have changed; the function returned ends that."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback) if callback in self._listeners else None

    def tell(self) -> None:
        """Call all listeners. An error of one stops neither the run nor the other listeners; it is logged once."""
        for callback in list(self._listeners):
            try:
                callback()
            except Exception as error:  # the callback is the user's
                if callback not in self._broken:
                    self._broken.append(callback)
                    self._state.said.append(
                        f"{callback!r}, given to run.on_change, raised {error!r}; later errors of it are not logged"
                    )

    def tell_of_news(self, look: Callable[[], object]) -> None:
        """Call all listeners if `look()` differs from the last time."""
        seen = look() if self._listeners else None
        if seen != self._seen:
            self._seen = seen
            self.tell()

"""Playing a run: it is stepped at a pace, on a thread of its own, until a breakpoint, the end, an error, or a stop."""

import threading
from collections.abc import Callable

from dinfer.plan.ops import PlanError
from dinfer.run.state import RunState

FASTEST = 100.0
"""the highest pace, in steps a second"""


class Play:
    """One play of a run."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.over = threading.Event()


class Player:
    """At most one play at a time; `state` has its call. On the play's thread, `failed(call, error)` is called if an
    error ends it, and `tell()` when it has ended by itself."""

    def __init__(
        self, state: RunState, failed: Callable[[str, Exception], None], tell: Callable[[], None]
    ) -> None:
        self._state, self._failed, self._tell = state, failed, tell
        self._lock = threading.Lock()
        self._play: Play | None = None
        self._error: Exception | None = None

    def start(self, call: str, step: Callable[[threading.Event], bool], period: float) -> None:
        """Call `step(stopping)` every `period` seconds until it returns False; returns at once. A step does nothing any
        more once `stopping` is set."""
        with self._lock:
            if self._play:
                self._play.stopping.set()
            self._play = play = Play()
            self._state.note_playing(call)
        arguments = (play, call, step, period)
        threading.Thread(target=self._go, args=arguments, name="dinfer play", daemon=True).start()

    def stop(self) -> bool:
        """End the play, before its next step; whether there was one. What ended an earlier play is forgotten."""
        with self._lock:
            play, self._play, self._error = self._play, None, None
            if play:
                play.stopping.set()
                self._state.note_playing("")
        return play is not None

    def wait(self, seconds: float) -> bool:
        """Wait that long for the play to end; whether it goes on."""
        play = self._play
        return play is not None and not play.over.wait(seconds)

    def check(self) -> None:
        """Raises the error that has ended the last play, if one has."""
        if self._error:
            raise self._error

    def _go(self, play: Play, call: str, step: Callable[[threading.Event], bool], period: float) -> None:
        try:
            while step(play.stopping) and not play.stopping.wait(period):
                pass
        except Exception as error:  # whatever ends a play, `check` raises it
            with self._lock:
                is_mine = self._play is play
                self._error = error if is_mine else self._error
            if is_mine:
                self._failed(call, error)
        with self._lock:
            by_itself = self._play is play
            if by_itself:
                self._play = None
                self._state.note_playing("")
        play.over.set()
        if by_itself:
            self._tell()


def period_of(per_second: float) -> float:
    """The seconds between two steps. Raises PlanError for a pace out of range."""
    if not 0 < per_second <= FASTEST:
        raise PlanError(
            f"per_second is {per_second}; it must be above 0 and at most {FASTEST:g}: run.resume() is the fastest."
        )
    return 1 / per_second

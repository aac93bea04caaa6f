"""When a run has come to a stand that its client does not know of, and why: the events `stopped` and `continued`."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

from dinfer.errors import DinferError
from dinfer.run.run import Run
from dinfer.run.state import IN_OPS, STANDING, Standing, State, with_remedy
from dinfer.severity import Severity
from dinfer.verdict.verdict import Verdict

LOOK_S = 0.2
"""how often to look, also without news"""

REASON_S = 1.0
"""for so long what a rank has found, such as a condition that holds, may be on its way from it"""

TITLES = {
    State.HUNG: "Hung",
    State.FAILED: "A rank has failed",
    State.LOST: "A rank is lost",
    State.TAKEN_OVER: "Taken over",
}


class SendEvent(Protocol):
    def __call__(self, name: str, **body: Any) -> None: ...


class DapClient(NamedTuple):
    """What reaches a client: events; `say(category, text)`, a text for its debug console, where the category is
    "console", "stdout" or "stderr"; `over(why)`: somebody else has ended the run."""

    event: SendEvent
    say: Callable[[str, str], None]
    over: Callable[[str], None]


class Stop(NamedTuple):
    """The body of a `stopped` event, but for the breakpoints. `title` is what editors show first; `whole`: all that
    there is to say, for the debug console."""

    reason: str
    title: str
    text: str
    rank: int | None = None
    whole: str = ""


def trouble_of(standing: Standing, rank: int | None, whole: str = "") -> Stop:
    """Why the run cannot go on; of a state that is in TITLES. `whole`: all that is known of it."""
    title, text = TITLES[standing.state], standing.message
    first = text.partition("\n")[0]
    whole = with_remedy(whole or text, standing.remedy)
    return Stop("exception", f"{title}: {first}", with_remedy(text, standing.remedy), rank, whole)


def stand_of(standing: Standing, reason: str) -> Stop:
    """Why a run stands that can go on. `reason`: what the client has asked for last."""
    first = standing.message.partition("\n")[0]
    if standing.state == State.DONE and reason in ("continue", "step", "pause"):
        done = f"decoded {standing.decoded} new tokens" if standing.decoded else "prefill is done"
        return Stop("pause" if reason == "continue" else reason, _sentence(done), standing.message)
    titles = {"entry": "Before the first op", "step": "Stepped", "goto": "Went there", "pause": "Paused"}
    if reason == "continue":
        return Stop("pause", _sentence(first or "paused"), standing.message)
    return Stop(reason, _sentence(first) if first else titles.get(reason, "Paused"), standing.message)


class StopTeller:
    """Tells a client of the stops of one run, on a thread of its own. `is_moving`: what the client believes.

    `breakpoints(numbers)`: what to say of these breakpoints: the reason, and the rank on which one has been met.
    """

    def __init__(
        self, run: Run, client: DapClient, breakpoints: Callable[[tuple[int, ...]], tuple[str, int | None]]
    ) -> None:
        self._run, self._client, self._breakpoints = run, client, breakpoints
        self._lock = threading.Lock()
        self._changed, self._ended = threading.Event(), threading.Event()
        self.is_moving = True
        self._reason, self._rank, self._busy, self._mends = "entry", 0, 0, False
        self._stood_at: float | None = None
        """when the run was first seen to stand without a reason"""
        self.continues = True
        """whether a run that moves goes on freely: what the client has asked for last is no step, jump or pause"""
        self._told: object = None
        self.stop: Stop | None = None
        """the stop that the client knows of; None while the run moves"""
        self._forget = run.on_change(self._changed.set)
        self._thread = threading.Thread(target=self._look_on, name="dinfer dap stops", daemon=True)

    def start(self) -> None:
        """The client is ready to hear of stops."""
        self._thread.start()

    def begin(self, reason: str, rank: int = 0, *, mends: bool = False) -> None:
        """The client has asked for a move, and takes the run for moving from now on. `mends`: the move ends what
        trouble there is, which is told again only if it is still there afterwards."""
        with self._lock:
            self.is_moving, self.stop, self._busy = True, None, self._busy + 1
            self._reason, self._rank, self._mends = reason, rank, mends
            self.continues = reason == "continue"
            self._told = None  # trouble that is still there is told again

    def done(self) -> None:
        """The call that began the move has returned."""
        with self._lock:
            self._busy -= 1
            if not self._busy:  # else the move that mends was asked for before this one returned
                self._mends = False
        self._changed.set()

    def pausing(self) -> None:
        """The client has asked for a pause: the next stand is one."""
        with self._lock:
            self._reason, self.continues = "pause", False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The run may stop and go on meanwhile, of which the client hears nothing."""
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            self.done()

    def close(self) -> None:
        """Tell nothing more."""
        self._forget()
        self._ended.set()
        self._changed.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2)

    def _look_on(self) -> None:
        while not self._ended.is_set():
            self._changed.wait(LOOK_S)
            self._changed.clear()
            if self._run.closed:
                if not self._ended.is_set():
                    self._client.over(self._run.closed)
                return
            with suppress(DinferError):
                self._run.look()
            self._tell()

    def _tell(self) -> None:
        standing = self._run.standing()
        key = (standing.state, standing.begun) if standing.state in TITLES else None
        if key and (self._mends or key == self._told):
            return
        trouble = self._trouble(standing) if key else None  # it may ask ranks, so nobody waits for it
        with self._lock:
            if self._ended.is_set():
                return
            if not trouble and self._has_gone_on(standing):
                self._told, self.is_moving, self.stop, self._reason = None, True, None, "continue"
                self._client.event("continued", threadId=1, allThreadsContinued=True)
            stands = standing.state in STANDING and not standing.playing and not self._busy
            if not trouble and not (self.is_moving and stands):
                return
            numbers = () if trouble else self._run.met
            if not trouble and not numbers and self._may_say_more(standing):
                return
            self._told, self.is_moving = key, False
            self.stop = stop = trouble or self._stand(standing, numbers)
        if trouble or numbers or standing.severity > Severity.NOTE:
            self._client.say("stderr" if trouble else "console", stop.whole or standing.message)
        rank = self._rank if stop.rank is None else stop.rank
        hits: dict[str, Any] = {"hitBreakpointIds": list(numbers)} if numbers else {}
        self._client.event(
            "stopped", reason=stop.reason, description=stop.title, text=stop.text, threadId=rank + 1,
            allThreadsStopped=True, **hits,
        )  # fmt: skip

    def _may_say_more(self, standing: Standing) -> bool:
        """Whether a run that was let go on has only just come to stand, and does not say yet why. A run stands at a
        breakpoint with its reason; that a condition holds comes from its rank a moment later."""
        if self._reason != "continue" or standing.message or standing.state != State.PAUSED:
            self._stood_at = None
            return False
        now = time.monotonic()
        self._stood_at = now if self._stood_at is None else self._stood_at
        return now - self._stood_at < REASON_S

    def _has_gone_on(self, standing: Standing) -> bool:
        """Whether the run moves, or has moved, without having been asked to by the client: for example a hang is
        over."""
        moves = not self._busy and standing.state in IN_OPS
        return not self.is_moving and (moves or self._told is not None)

    def _trouble(self, standing: Standing) -> Stop:
        with suppress(DinferError):
            verdict = self._run.told or self._run.verdict()
            return trouble_of(standing, verdict.rank, _whole(verdict, standing))
        return trouble_of(standing, _culprit(standing))

    def _stand(self, standing: Standing, numbers: tuple[int, ...]) -> Stop:
        stop = stand_of(standing, self._reason)
        if numbers:
            reason, rank = self._breakpoints(numbers)
            stop = Stop(reason, _sentence(standing.message.partition("\n")[0]), standing.message, rank)
        return stop


def _whole(verdict: Verdict, standing: Standing) -> str:
    """The verdict with its lines, and what else is known of the failure."""
    text = str(verdict)
    return text if standing.message.partition("\n")[0] in text else f"{standing.message}\n{text}"


def _culprit(standing: Standing) -> int | None:
    """The first rank whose process is gone."""
    return next((rank for rank, lives in enumerate(standing.alive) if not lives), None)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]

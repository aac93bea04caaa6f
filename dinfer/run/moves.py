"""How a run is moved: to a cut, to the next breakpoint, at a pace, to the end of prefill, or to a stop."""

import threading
from collections.abc import Callable

from dinfer.cluster.lease import RankLease
from dinfer.job import Job
from dinfer.plan.cut import Unit
from dinfer.plan.ops import PlanError
from dinfer.run.breakpoints import BreakpointTable
from dinfer.run.failure import RankFailed
from dinfer.run.state import RunState
from dinfer.run.stepper import Move, NoProgress, RemoteFleet, Stepper

INTERRUPT_S = 1.5
"""how long an interrupted call waits for the ranks to stop"""

FASTEST = 100.0
"""the highest pace, in steps a second"""


class Moves:
    """A stepper with breakpoints. A plan that was refuted has no consistent cuts: it can only be let go."""

    def __init__(
        self,
        job: Job,
        ranks: RankLease,
        state: RunState,
        breakpoints: BreakpointTable,
        check: Callable[[], None],
    ) -> None:
        self._job, self._state, self._breakpoints = job, state, breakpoints
        self._fleet = RemoteFleet(job.plan, ranks, check)
        self._stepper: Stepper | None = None
        self._playing = threading.Event()
        """set by whoever stops a run that plays"""

    def begin(self) -> None:
        """All ranks stand before their first op."""
        self._stepper = Stepper(self._fleet, self._job.config.timeout) if self._job.verdict.proved else None

    @property
    def stepper(self) -> Stepper:
        """Raises PlanError for a plan that was refuted."""
        if self._stepper is None:
            raise PlanError(
                "this plan was refuted, so it has no cuts to stop at: resume it, and watch it hang."
            )
        return self._stepper

    @property
    def at_end(self) -> bool:
        """Whether prefill is done; True of a plan that cannot be stepped."""
        return self._stepper is None or self._stepper.at_end

    def leaving(self) -> Stepper:
        """The stepper, for a move to elsewhere than the next breakpoint. Raises PlanError."""
        stepper = self.stepper
        self._breakpoints.forget_ahead()
        return stepper

    def play(self, unit: Unit) -> Move:
        """One step, but not past the next breakpoint."""
        stepper = self.leaving()
        limit, met = self._breakpoints.ahead(stepper.cuts, stepper.pause())
        move = stepper.step_towards(limit, unit)
        if met and move.after == limit:
            self._breakpoints.expect(met)  # so that `arrived` names them
            return move._replace(stopped=True)
        return move

    def begin_to_play(self) -> None:
        """From now on, `pause` ends the playing."""
        self._playing.clear()

    def plays_on(self, seconds: float) -> bool:
        """Wait so long between two steps; False at once when somebody pauses."""
        return not self._playing.wait(seconds)

    def stop_playing(self) -> None:
        """Make no further step."""
        self._playing.set()

    def resume(self) -> None:
        """Let the ranks go on to the next breakpoint, or the end of prefill; returns at once."""
        if self._stepper is None:
            end = tuple(tuple(len(lane.ops) for lane in lanes) for lanes in self._job.plan.lanes)
            self._fleet.set_limits(end)
            return
        limit, met = self._breakpoints.ahead(self._stepper.cuts, self._stepper.pause())
        self._stepper.resume(limit)
        self._breakpoints.expect(met)  # not earlier: `arrived` is asked while the run still stands

    def finish(self) -> bool:
        """Resume and wait; False if the run stopped before the end of prefill."""
        if self._stepper and not self._stepper.at_end:
            self.resume()
            self._stepper.wait(None)
        return self.at_end

    def pause(self) -> None:
        """Stop at the nearest cut, also a move that another thread waits for."""
        if self._stepper is None:
            self._fleet.freeze()
        else:
            self._breakpoints.forget_ahead()
            self._stepper.pause()

    def pause_order(self, order: int, why: str) -> bool:
        """A rank has stopped under that order: stop the others too, and say why; False, and nothing is done, if the
        user has sent the ranks elsewhere since."""
        self._state.message, before = why, self._state.message  # the move under way returns with this message
        if self._stepper and self._stepper.pause_order(order):
            self._state.say(why)
            return True
        self._state.message = before
        return False

    def interrupted(self) -> None:
        """After a keyboard interrupt: stop at the next cut, mostly before this returns."""
        self._breakpoints.forget_ahead()
        try:
            if self._stepper and not self._state.is_decoding:
                self._stepper.pause(INTERRUPT_S)
            self._state.say("interrupted: the run is paused")
        except (NoProgress, RankFailed, TimeoutError) as error:
            self._state.say(f"interrupted; the ranks stop as soon as their ops end: {error}")


def pace_of(per_second: float) -> float:
    """Raises PlanError for a pace that is out of range."""
    if not 0 < per_second <= FASTEST:
        raise PlanError(
            f"per_second is {per_second}; it must be above 0 and at most {FASTEST:g}: run.resume() is the fastest."
        )
    return per_second

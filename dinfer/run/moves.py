"""How a run is moved: to a cut, to the next breakpoint, at a pace, to the end of prefill, or to a stop."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from dinfer.plan.cut import Cut, Unit
from dinfer.plan.ops import PlanError
from dinfer.results import Moved
from dinfer.run.breakpoints import BreakpointTable
from dinfer.run.failure import RankFailed
from dinfer.run.state import RunState
from dinfer.run.stepper import Fleet, Move, NoProgress, Stepper
from dinfer.severity import Severity
from dinfer.verdict.where import moved_lines

INTERRUPT_S = 1.5
"""how long an interrupted call waits for the ranks to stop"""

FASTEST = 100.0
"""the highest pace, in steps a second"""


class Moves:
    """A stepper with breakpoints. A plan that was refuted has no consistent cuts: it can only be let go. `check()`
    raises where the run cannot go on; `went(move)` is called after every move to a cut."""

    def __init__(
        self,
        state: RunState,
        breakpoints: BreakpointTable,
        check: Callable[[], None],
        went: Callable[[Move], None],
    ) -> None:
        self._state, self._breakpoints, self._went = state, breakpoints, went
        self._fleet = Fleet(state.plan, state.ranks, check)
        self._stepper: Stepper | None = None
        self.stop_playing = threading.Event()  # set: `play` makes no further step

    def begin(self) -> None:
        """All ranks stand before their first op."""
        job = self._state.job
        self._stepper = Stepper(self._fleet, job.config.timeout) if job.verdict.proved else None

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
        self._breakpoints.expect([])
        return stepper

    def moved(self, move: Move) -> Moved:
        """A move as its user sees it."""
        self._went(move)
        return self._as_moved(move.before, move)

    def play(self, unit: Unit, per_second: float, alone: AbstractContextManager[object]) -> Moved:
        """Step at that pace, each step `alone`, until a breakpoint, the end of prefill, or `stop_playing`. Raises
        PlanError for a pace out of range."""
        if not 0 < per_second <= FASTEST:
            raise PlanError(
                f"per_second is {per_second}; it must be above 0 and at most {FASTEST:g}: run.resume() is the fastest."
            )
        self.stop_playing.clear()
        start: Cut = ()
        while True:
            with alone:
                stepper = self.leaving()
                limit, met = self._breakpoints.ahead(stepper.cuts, stepper.pause())
                move = stepper.step_towards(limit, unit)
                if met and move.after == limit:
                    self._breakpoints.expect(met)  # so that `arrived` names them
                    move = move._replace(stopped=True)
                self._went(move)
            start = start or move.before
            if not move.moved or move.stopped or self.stop_playing.wait(1 / per_second):
                return self._as_moved(start, move)

    def resume(self) -> None:
        """Let the ranks go on to the next breakpoint, or the end of prefill; returns at once."""
        if self._stepper is None:
            end = tuple(tuple(len(lane.ops) for lane in lanes) for lanes in self._state.plan.lanes)
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
            self._breakpoints.expect([])
            self._stepper.pause()

    def pause_order(self, order: int, why: str, severity: Severity = Severity.NOTE) -> bool:
        """A rank has stopped under that order: stop the others too, and say why; False, and nothing is done, if the
        user has sent the ranks elsewhere since."""
        before = self._state.replace_message(why, severity)  # the move under way returns with it
        if self._stepper and self._stepper.pause_order(order):
            self._state.say(why, severity)
            return True
        self._state.replace_message(*before)
        return False

    def interrupted(self) -> None:
        """After a keyboard interrupt: stop at the next cut, mostly before this returns."""
        self._breakpoints.expect([])
        try:
            if self._stepper and not self._state.is_decoding:
                self._stepper.pause(INTERRUPT_S)
            self._state.say("interrupted: the run is paused")
        except (NoProgress, RankFailed, TimeoutError) as error:
            self._state.say(
                f"interrupted; the ranks stop as soon as their ops end: {error}", Severity.WARNING
            )

    def _as_moved(self, before: Cut, move: Move) -> Moved:
        remark = ""
        if move.stopped:
            remark = self._state.message or "stopped before it was through"
        elif not move.moved:
            is_end = move.after == self.stepper.cuts.end
            remark = f"nothing to do: the run stands at the {'end of prefill' if is_end else 'start'}"
        lines = moved_lines(self._state.plan, before, move.after)
        return Moved(before, move.after, move.stopped, tuple(lines), remark, tuple(self._state.edited))

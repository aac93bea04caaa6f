"""How a run is moved: to a cut, to the next breakpoint, at a pace, to the end of prefill, or to a stop."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from dinfer.cluster.lease import RankLease
from dinfer.job import Job
from dinfer.plan.cut import Cut, Unit
from dinfer.plan.ops import PlanError
from dinfer.results import Moved
from dinfer.run.breakpoints import BreakpointTable
from dinfer.run.decode import Generation
from dinfer.run.events import RunEvents
from dinfer.run.failure import RankFailed
from dinfer.run.state import RunState
from dinfer.run.stepper import Move, NoProgress, RemoteFleet, Stepper
from dinfer.verdict.where import moved_lines

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
        generation: Generation,
        events: RunEvents,
        check: Callable[[], None],
    ) -> None:
        self._job, self._state, self._breakpoints = job, state, breakpoints
        self._generation, self._events = generation, events
        self._fleet = RemoteFleet(job.plan, ranks, check)
        self._stepper: Stepper | None = None
        self._stop_playing = threading.Event()

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

    def moved(self, move: Move) -> Moved:
        """A move as its user sees it. What was known of blocks and tokens behind it no longer holds."""
        self._note(move)
        return self._as_moved(move.before, move)

    def play(self, unit: Unit, per_second: float, alone: Callable[[], AbstractContextManager[None]]) -> Moved:
        """Step at that pace, each step `alone()`, until a breakpoint, the end of prefill, or `stop_playing`. Raises
        PlanError for a pace out of range."""
        if not 0 < per_second <= FASTEST:
            raise PlanError(
                f"per_second is {per_second}; it must be above 0 and at most {FASTEST:g}: run.resume() is the fastest."
            )
        self._stop_playing.clear()
        first = last = self._play(unit, alone)
        while last.moved and not last.stopped and not self._stop_playing.wait(1 / per_second):
            last = self._play(unit, alone)
        return self._as_moved(first.before, last)

    def stop_playing(self) -> None:
        """Make no further step."""
        self._stop_playing.set()

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
        before = self._state.replace_message(why)  # the move under way returns with it
        if self._stepper and self._stepper.pause_order(order):
            self._state.say(why)
            return True
        self._state.replace_message(before)
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

    def not_done(self) -> str:
        """Why decode cannot begin yet, and what to do."""
        clear = "; run.breakpoints.clear() removes all breakpoints" * bool(self._breakpoints.view())
        return (
            f"prefill is not done: {self._state.message or 'it was paused'}\n"
            f"run.resume() or run.decode() goes on from there{clear}"
        )

    def _play(self, unit: Unit, alone: Callable[[], AbstractContextManager[None]]) -> Move:
        """One step, but not past the next breakpoint."""
        with alone():
            stepper = self.leaving()
            limit, met = self._breakpoints.ahead(stepper.cuts, stepper.pause())
            move = stepper.step_towards(limit, unit)
            if met and move.after == limit:
                self._breakpoints.expect(met)  # so that `arrived` names them
                move = move._replace(stopped=True)
            self._note(move)
            return move

    def _note(self, move: Move) -> None:
        self._state.marks.went(self._job.plan, move.before, move.after)
        self._events.went(move.before, move.after)
        if move.after != self.stepper.cuts.end:
            self._generation.forget()

    def _as_moved(self, before: Cut, move: Move) -> Moved:
        remark = ""
        if move.stopped:
            remark = self._state.message or "stopped before it was through"
        elif not move.moved:
            is_end = move.after == self.stepper.cuts.end
            remark = f"nothing to do: the run stands at the {'end of prefill' if is_end else 'start'}"
        lines = moved_lines(self._job.plan, before, move.after)
        return Moved(before, move.after, move.stopped, tuple(lines), remark, tuple(self._state.edited))

"""How a run is moved: to a cut, to the next breakpoint, to the end of prefill, or to a stop."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from dinfer.plan.cut import Cut, Unit
from dinfer.plan.ops import PlanError
from dinfer.results import Moved
from dinfer.run.breakpoints import BreakpointTable
from dinfer.run.failure import RankFailed
from dinfer.run.state import IN_OPS, RunState
from dinfer.run.stepper import Fleet, Move, NoProgress, Stepper
from dinfer.severity import Severity
from dinfer.verdict.where import moved_lines

INTERRUPT_S = 1.5
"""how long an interrupted call waits for the ranks to stop"""

WAIT_S = 0.1
"""how often whoever waits for the end of prefill checks whether the run can still go on"""

HALT_S = 5.0
"""how long ranks that an earlier session has left may take to come to a cut"""


class Moves:
    """A stepper with breakpoints. A plan that was refuted has no consistent cuts: it can only be let go, and frozen as
    it is. `check()` raises where the run cannot go on; `went(move)` is called after every move to a cut."""

    def __init__(
        self,
        state: RunState,
        breakpoints: BreakpointTable,
        check: Callable[[], None],
        went: Callable[[Move], None],
    ) -> None:
        self._state, self._breakpoints, self.went = state, breakpoints, went
        self._check = check
        self._fleet = Fleet(state.plan, state.ranks, check)
        self._stepper: Stepper | None = None

    def begin(self) -> None:
        """All ranks stand before their first op."""
        job = self._state.job
        self._stepper = Stepper(self._fleet, job.config.timeout) if job.verdict.proved else None

    def halt(self) -> None:
        """Bring ranks that an earlier session has left on their way to a cut. One that hangs, or has failed, is left as
        it is: whoever looks after the run finds out why."""
        with suppress(NoProgress, RankFailed, TimeoutError):
            if self._stepper:
                self._stepper.pause(HALT_S)

    @property
    def can_step(self) -> bool:
        """Whether the plan was proved, and so has cuts to stop at."""
        return self._stepper is not None

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
        """Whether prefill is done."""
        return self._stepper.at_end if self._stepper else self._state.is_prefilled

    def leaving(self) -> Stepper:
        """The stepper, for a move to elsewhere than the next breakpoint. Raises PlanError."""
        stepper = self.stepper
        self._breakpoints.expect([])
        return stepper

    def moved(self, move: Move) -> Moved:
        """A move as its user sees it."""
        tokens = len(self._state.tokens)
        self.went(move)
        lines = moved_lines(self._state.plan, move.before, move.after)
        if gone := tokens - len(self._state.tokens):
            lines[-1] += f", and {gone} new token{'s' * (gone != 1)}"
        remark = ""
        if move.stopped:
            remark = self._state.message or "stopped before it was through"
        elif not move.moved:
            remark = self.nothing_to_do(move.after)
        return Moved(*move, tuple(lines), remark, tuple(self._state.edited))

    def nothing_to_do(self, cut: Cut) -> str:
        """Why a run that stands there is not moved; also the run's message from now on."""
        place = {self.stepper.cuts.end: "the end of prefill", self.stepper.cuts.start: "the start"}
        text = f"nothing to do: the run stands at {place.get(cut, 'that cut')}"
        self._state.replace_message(text)
        return text

    def play_from(self) -> bool:
        """Whether a run that is to be played has anything to do."""
        stepper = self.leaving()
        cut = stepper.pause()
        stepper.heading = cut, stepper.cuts.end
        if cut == stepper.cuts.end:
            self.nothing_to_do(cut)
        return cut != stepper.cuts.end

    def play_on(self, unit: Unit) -> bool:
        """Step by one unit, but not past the next breakpoint; whether there is more to play."""
        move, has_met = self._step_to_stop(unit)
        self.went(move)
        return not (move.stopped or has_met or move.after == self.stepper.cuts.end)

    def step_to_stop(self, unit: Unit) -> Moved:
        """Step by one unit, but not past the next breakpoint."""
        move, _ = self._step_to_stop(unit)
        return self.moved(move)

    def _step_to_stop(self, unit: Unit) -> tuple[Move, bool]:
        """The move, and whether a breakpoint has ended it."""
        stepper = self.leaving()
        limit, met = self._breakpoints.ahead(stepper.cuts, stepper.pause())
        self._breakpoints.expect(met, limit)
        move = stepper.step_towards(limit, unit)
        return move, bool(met) and move.after == limit

    def back_to_stop(self) -> Moved:
        """Go back to the last place at which a breakpoint has stopped the run, or would have, or to the start."""
        stepper = self.stepper
        before = stepper.pause()
        target, met = self._breakpoints.behind(stepper.cuts, before)
        moved = self.moved(self.leaving().go_to(target))
        if moved.stopped or not moved.moved:
            return moved
        if met:
            with (
                self._state.ranks.changed
            ):  # else who looks at the run would be told of the arrival in its place
                self._breakpoints.expect(met, moved.after)
                remark = self._breakpoints.arrived(moved.after)
                self._state.say(remark)
        else:
            remark = "back at the start: no breakpoint stops the run before where it stood"
            self._state.replace_message(remark)
        return replace(moved, remark=remark)

    def resume(self) -> None:
        """Let the ranks go on to the next breakpoint, or the end of prefill; returns at once."""
        if self._stepper is None:
            end = tuple(tuple(len(lane.ops) for lane in lanes) for lanes in self._state.plan.lanes)
            self._state.note_frozen(is_frozen=False)
            self._fleet.set_limits(end)
            return
        cut = self._stepper.pause()
        limit, met = self._breakpoints.ahead(self._stepper.cuts, cut)
        self._breakpoints.expect(met, limit)
        self._stepper.resume(limit)
        if cut == self._stepper.cuts.end:
            self.nothing_to_do(cut)

    def finish(self, is_stopped: Callable[[], bool], on_way: Callable[[], None]) -> bool:
        """Resume and wait; False if the run stopped before the end of prefill. `is_stopped()`: whether a pause was
        asked for since the caller began, perhaps before there was anything to pause. `on_way()` is called once the
        ranks are on their way to the end."""
        if not self.at_end:
            self.resume()
            if self._stepper and self._stepper.heads_for_end:
                on_way()
            if is_stopped():
                self.pause()
            if self._stepper:
                self._stepper.wait(None)
            while self._state.is_doing(IN_OPS, WAIT_S):
                self._check()
        return self.at_end

    def pause(self) -> None:
        """Stop at the nearest cut, also a move that another thread waits for; where there are no cuts, each rank after
        what it computes, in the transfers that it is in."""
        if self._stepper is None:
            self._fleet.freeze()
            self._state.note_frozen(is_frozen=True)
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
            self._state.say(f"interrupted: the run is {self._state.now}")
        except (NoProgress, RankFailed, TimeoutError) as error:
            self._state.say(
                f"interrupted; the ranks stop as soon as their ops end: {error}", Severity.WARNING
            )

"""The moves of a run, as its history has them: each is undone by going to where the run stood before it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from dinfer.errors import NotPossible
from dinfer.history import History
from dinfer.plan.cut import Cut
from dinfer.run.decode import Generation
from dinfer.run.log import LoggedCall
from dinfer.run.moves import Moves
from dinfer.run.state import STANDING, RunState
from dinfer.verdict.where import returned_text

HALF_WAY = "undo was paused half-way: run.undo() goes on with it."


class MoveHistory:
    """Adds moves to `history`. A plan that was refuted has no cuts, so its moves cannot be undone."""

    def __init__(self, state: RunState, moves: Moves, generation: Generation, history: History) -> None:
        self._state, self._moves, self._generation, self._history = state, moves, generation, history
        if not state.job.verdict.proved:
            history.forget("this plan was refuted, so it has no cuts to go back to")

    @contextmanager
    def moving(self, made: LoggedCall) -> Iterator[None]:
        """Whatever moves the run meanwhile can be undone, also if it fails or is interrupted."""
        if not self._moves.can_step:
            yield
            return
        stepper, tokens = self._moves.stepper, len(self._state.tokens)
        stepper.heading = None
        try:
            yield
        except KeyboardInterrupt:
            made.cut_short = True
            raise
        finally:
            gained = len(self._state.tokens) - tokens
            if made.cut_short and gained >= 0:
                made.tokens = gained
            end = stepper.cuts.end
            start, target = stepper.heading or (end, end)
            if stepper.heading:
                made.start, made.target = start, target
            if start != target or len(self._state.tokens) != tokens:
                self._history.add(made.text, partial(self._return_to, start, tokens))

    @contextmanager
    def undoing(self, made: LoggedCall) -> Iterator[None]:
        """An undo is under way, which may go elsewhere."""
        if self._moves.can_step:
            self._moves.stepper.heading = None
        yield
        if self._moves.can_step and (heading := self._moves.stepper.heading):
            made.start = heading[0]

    @contextmanager
    def restarting(self, call: str) -> Iterator[None]:
        """Beginning again can be undone if the run stood at a cut; else nothing before it can be undone."""
        place = self._place()
        yield
        if not self._moves.can_step:
            return
        if place is None:
            self._history.forget(f"the run had failed, or did not stand, before {call} began it anew")
        elif place != (self._moves.stepper.cuts.start, 0):
            self._history.add(call, partial(self._return_to, *place))

    def _place(self) -> tuple[Cut, int] | None:
        """The cut at which the run stands, and the number of new tokens; None if it does not."""
        cut = tuple(stand.positions for stand in self._state.stands())
        if self._state.now not in STANDING or not self._moves.can_step:
            return None
        return (cut, len(self._state.tokens)) if self._moves.stepper.cuts.is_consistent(cut) else None

    def _return_to(self, cut: Cut, tokens: int) -> str:
        """Go to that cut, and have that many new tokens there; what was undone and done for it. Raises NotPossible
        if a pause stops it."""
        had = len(self._state.tokens)
        self._generation.begin()
        move = self._moves.leaving().go_to(cut)
        self._moves.went(move)
        if move.stopped:
            raise NotPossible(HALF_WAY)
        if tokens < len(self._state.tokens):
            self._generation.back_to(tokens)
        elif tokens > len(self._state.tokens):
            # Fewer if an edit by hand has changed where the text ends.
            made = self._generation.go(tokens, None)
            if made.stopped == "user":
                raise NotPossible(made.remark or HALF_WAY)
        lines = [returned_text(self._state.plan, move.before, cut, had, len(self._state.tokens))]
        edited = self._state.edited
        lines += [f"what was edited by hand is not undone: {', '.join(edited)}"] * bool(edited)
        return "\n".join(lines)

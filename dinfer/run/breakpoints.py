"""Stops: the breakpoints of one run: set, armed on the ranks, met."""

from collections.abc import Callable
from typing import Any

from dinfer.config import Config
from dinfer.messages import BreakpointHit
from dinfer.plan.breakpoints import Breakpoint, check, next_stop, parse_when
from dinfer.plan.cut import Cut, Cuts, Unit
from dinfer.plan.ops import OpKind, PlanError
from dinfer.results import Breakpoints
from dinfer.run.stepper import Move, Stepper


def check_digests(when: str | None, config: Config) -> None:
    """Raises PlanError for a condition on digests where none are taken."""
    if parse_when(when)[0] == "digest" and not config.digests:
        raise PlanError(f"when is {when!r}, but this run has digests=False: start it with digests=True.")


class Stops:
    """`arm` gives the ranks the conditions to look out for."""

    def __init__(self, arm: Callable[[list[dict[str, Any]]], object]) -> None:
        self._tell = arm
        self._found: dict[int, Breakpoint] = {}
        self._count = 0
        self._ahead: list[Breakpoint] = []

    def view(self) -> Breakpoints:
        return Breakpoints(self._found, self.arm)

    def add(
        self,
        cuts: Cuts,
        *,
        rank: int | None,
        op: OpKind | None,
        chunk: int | None,
        layer: int | None,
        when: str | None,
    ) -> Breakpoint:
        """Set one. Raises PlanError where nothing in the plan could meet it."""
        condition, bound = parse_when(when)
        kind = op or ("recv" if condition == "digest" else "layer")
        one = Breakpoint(self._count + 1, rank, kind, chunk, layer, condition, bound)
        check(one, cuts)
        self._count += 1
        self._found[one.number] = one
        self.arm()
        return one

    def ahead(self, cuts: Cuts, cut: Cut) -> tuple[Cut, list[Breakpoint]]:
        """How far a run that stands at `cut` may go on, and the breakpoints that it then has met."""
        return next_stop(cuts, cut, list(self._found.values()))

    def expect(self, breakpoints: list[Breakpoint]) -> None:
        """The run is on its way to these."""
        self._ahead = breakpoints

    def forget_ahead(self) -> None:
        """The run was sent elsewhere than to the next breakpoint."""
        self._ahead = []

    def arrived(self) -> str:
        """What to say of a run that has come to its limit; empty if no breakpoint is there."""
        met, self._ahead = self._ahead, []
        return f"stopped at {'; '.join(map(str, met))}" if met else ""

    def hit(self, rank: int, note: BreakpointHit) -> str:
        """What to say of a condition that a rank has found to hold; empty if it is no longer looked for."""
        one = Breakpoint.of(note.breakpoint)
        if one.number not in self._found:
            return ""
        self._ahead = []
        return f"stopped at {one}: rank {rank}, `{note.op}`: {note.found}"

    def arm(self) -> None:
        """Have the ranks look out for the conditions that are set now, and for no others."""
        self._tell([one.as_dict() for one in self._found.values() if one.condition])


FASTEST = 100.0


def pace_of(per_second: float) -> float:
    """Raises PlanError for a pace that is none."""
    if not 0 < per_second <= FASTEST:
        raise PlanError(
            f"per_second is {per_second}; it must be above 0 and at most {FASTEST:g}: run.resume() is the fastest."
        )
    return per_second


def play_on(stepper: Stepper, stops: Stops, unit: Unit) -> Move:
    """One more step, not past the next breakpoint."""
    limit, met = stops.ahead(stepper.cuts, stepper.pause())
    move = stepper.step_towards(limit, unit)
    if met and move.after == limit:
        stops.expect(met)  # whoever looks next finds that they were met
        return move._replace(stopped=True)
    return move

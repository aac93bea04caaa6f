"""Playing: stepping by itself, at a pace that eyes can follow, with breakpoints in its way."""

from dinfer.plan.cut import Unit
from dinfer.plan.ops import PlanError
from dinfer.session.runs.stepper import Move, Stepper
from dinfer.session.runs.stops import Stops

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

"""What every action on a run has in common, whoever calls it."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from dinfer.plan.cut import UNITS, Unit
from dinfer.plan.ops import PlanError


class Acted(Protocol):
    """What an action needs of a run."""

    def begin_action(self, call: str) -> None:
        """Raises where the run is over."""

    def interrupted(self) -> None:
        """A keyboard interrupt has broken the action off."""

    def tell(self) -> None:
        """Something may have changed."""


P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound=Acted)


def action(method: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    """An action is remembered as its user wrote it, refused on a run that is over, and leaves the run paused at a cut
    where a keyboard interrupt breaks it off."""

    @wraps(method)
    def called(run: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        run.begin_action(_text(method.__name__, args, kwargs))
        try:
            return method(run, *args, **kwargs)
        except KeyboardInterrupt:
            run.interrupted()
            raise
        finally:
            run.tell()

    return called


def _text(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    parts = [repr(value) for value in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
    return f"run.{name}({', '.join(parts)})"


def unit_of(name: str) -> Unit:
    """The unit of that name. Raises PlanError."""
    for unit in UNITS:
        if unit == name:
            return unit
    raise PlanError(f"{name!r} is not a unit to step by; use one of {', '.join(UNITS)}, token.")


def count_of(n: int) -> int:
    """A number of steps or tokens. Raises PlanError."""
    if n < 1:
        raise PlanError(f"n is {n}; it must be at least 1.")
    return n

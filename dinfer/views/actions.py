"""Actions: the Python calls behind the panel's buttons."""

from collections.abc import Callable

from dinfer.views.desk import Action
from dinfer.views.protocol import InspectableRun, Json

PLACES = ("layer", "chunk", "rank")


def action_of(run: InspectableRun, message: Json) -> Action:
    """The action for a message that moves the run or asks it something."""
    match message:
        case {"do": "step", "unit": ("op" | "layer" | "wave" | "chunk") as unit}:
            return Action(f'run.step("{unit}")', lambda: run.step(unit))
        case {"do": "step_back", "unit": ("op" | "layer" | "wave" | "chunk") as unit}:
            return Action(f'run.step_back("{unit}")', lambda: run.step_back(unit))
        case {"do": "play", "unit": ("op" | "layer" | "wave" | "chunk") as unit, "per_second": pace} if (
            isinstance(pace, int | float)
        ):
            return Action(f'run.play("{unit}", per_second={pace:g})', lambda: run.play(unit, per_second=pace))
        case {"do": "run_to", "chunk": int(chunk), "layer": int(layer)}:
            call = f"run.run_to(chunk={chunk}, layer={layer})"
            return Action(call, lambda: run.run_to(chunk=chunk, layer=layer))
        case {"do": "resume"}:
            return Action("run.resume()", run.resume)
        case {"do": "restart"}:
            return Action("run.restart()", run.restart)
        case {"do": "diff"}:
            return _noted(run, "run.kv().diff()", lambda: run.kv().diff(), asks=True)
        case {"do": "why"}:
            return _noted(run, "run.verdict()", run.verdict, asks=True)
    return Action("panel", lambda: _refuse(message))


def edit_of(run: InspectableRun, message: Json) -> Action | None:
    """The action for a message that changes breakpoints or faults, which does not wait for a step; None for others."""
    match message:
        case {"do": "break_at"}:
            return _break_at(run, message)
        case {"do": "remove_breakpoint", "number": int(number)}:
            return _noted(run, f"run.breakpoints.remove({number})", lambda: run.breakpoints.remove(number))
        case {"do": "clear_breakpoints"}:
            return _noted(run, "run.breakpoints.clear()", lambda: run.breakpoints.clear())
        case {"do": "clear_faults"}:
            return _noted(run, "run.faults.clear()", lambda: run.faults.clear())
    return None


def _noted(run: InspectableRun, call: str, do: Callable[[], object], *, asks: bool = False) -> Action:
    """An action that the run does not record itself: sets its `last_call`."""

    def done() -> object:
        run.last_call = call
        return do()

    return Action(call, done, asks)


def _break_at(run: InspectableRun, message: Json) -> Action:
    """Set a breakpoint; layer, chunk or rank is left out for any. `instead`: the breakpoint that it replaces, which
    stays if the new one is refused."""
    given = {name: message[name] for name in PLACES if isinstance(message.get(name), int)}
    given |= {"when": str(message["when"])} if message.get("when") else {}
    call = f"run.break_at({', '.join(f'{name}={value!r}' for name, value in given.items())})"
    instead = message.get("instead")
    if not isinstance(instead, int):
        return Action(call, lambda: run.break_at(**given))

    def change() -> None:
        run.break_at(**given)
        run.breakpoints.remove(instead)

    return Action(f"{call}; run.breakpoints.remove({instead})", change)


def _refuse(message: Json) -> None:
    raise ValueError(f"the browser sent {message}, which the panel does not know: reload the page.")

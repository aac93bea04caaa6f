"""Panel: a run as a live map in a notebook, with the buttons that move it.

The kernel's side: what to show, what a button means. The browser's side is map.js, panel.js and panel.css.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import anywidget
from traitlets import Bytes, Dict

from dinfer.views.cells import CellMap, cut_line
from dinfer.views.desk import Action, Painter, Worker
from dinfer.views.protocol import Run
from dinfer.views.status import Json, layout, status
from dinfer.views.still import still_html

_HERE = Path(__file__).parent


class Panel(anywidget.AnyWidget):
    """The panel of a run: show it as the last line of a cell.

    Several panels may show one run; all follow it, whoever moves it. `close()` takes it off the page and leaves no
    thread, but for an action under way, which ends by itself.
    """

    _esm = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in ("map.js", "panel.js"))
    _css = (_HERE / "panel.css").read_text(encoding="utf-8")

    board = Dict().tag(sync=True)
    """what does not change: see `status.layout`"""
    shown = Dict().tag(sync=True)
    """what does: see `status.status`; with it the cut, the actions under way and errors"""
    cells = Bytes().tag(sync=True)
    """a byte for each (layer, chunk, rank): see `cells`"""

    def __init__(self, run: Run) -> None:
        self._run, self._cells = run, CellMap(run.plan)
        self._painter = Painter(self._paint)
        self._worker = Worker("dinfer panel worker", self._painter.touch)
        self._pauser = Worker(
            "dinfer panel pauser", self._painter.touch
        )  # never behind a step that takes long
        super().__init__(board=layout(run.plan, run.chunk_labels()))
        self._paint()
        self.on_msg(self._on_message)
        self._unsubscribe: Callable[[], None] | None = run.on_change(self._painter.touch)
        self._painter.touch()  # for what changed between the first picture and the subscription

    def close(self) -> None:
        """Take the panel off the page; the run goes on."""
        if self._unsubscribe:
            self._unsubscribe()
            self._unsubscribe = None
            self._worker.close()
            self._pauser.close()
            self._painter.close()
        super().close()

    def _paint(self) -> None:
        """Send the run as it is now; the only place that does."""
        try:
            standing = self._run.standing()
            states = self._cells.states(standing.stands)
            shown = {**status(self._run.plan, standing), "cut": cut_line(states), **self._actions()}
            drawn = states.tobytes()
        except Exception as error:  # there is nobody else to tell
            trouble = f"where the run stands cannot be shown: {error}"
            shown, drawn = {**self.shown, **self._actions(), "error": trouble}, self.cells
        with self.hold_sync():
            self.shown, self.cells = shown, drawn

    def _actions(self) -> Json:
        workers = (self._pauser, self._worker)
        waiting = self._worker.waiting
        return {
            "working": [action.call for worker in workers if (action := worker.current)],
            "waiting": waiting.call if waiting else "",
            "error": "\n".join(worker.error for worker in workers if worker.error),
        }

    def _on_message(self, _: object, message: Json, __: object) -> None:
        """A button was pressed. Answered at once, so that the browser knows that the kernel listens."""
        self.send({"heard": message.get("id")})
        if message.get("do") in ("pause", "dismiss"):  # what waits was asked for before, and so is void
            self._worker.forget()
            self._pauser.forget()
        if message.get("do") == "pause":
            self._pauser.ask(Action("run.pause()", self._run.pause))
        elif message.get("do") != "dismiss":
            self._worker.ask(action_of(self._run, message))
        self._painter.touch()

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[Json, Json]:
        """The live view, and a still picture of now for where there is no kernel."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        try:
            still = still_html(self._run.plan, self._run.standing(), self._run.chunk_labels())
        except Exception as error:  # the live view must come nevertheless, and has a banner
            still = escape(f"dinfer: where the run stands cannot be shown: {error}")
        return {**data, "text/html": still}, metadata


def action_of(run: Run, message: Json) -> Action:
    """What a button asks for, as the Python call that it is."""
    match message:
        case {"do": "step", "unit": ("op" | "layer" | "wave" | "chunk") as unit}:
            return Action(f'run.step("{unit}")', lambda: run.step(unit))
        case {"do": "step_back", "unit": ("op" | "layer" | "wave" | "chunk") as unit}:
            return Action(f'run.step_back("{unit}")', lambda: run.step_back(unit))
        case {"do": "run_to", "chunk": int(chunk), "layer": int(layer)}:
            call = f"run.run_to(chunk={chunk}, layer={layer})"
            return Action(call, lambda: run.run_to(chunk=chunk, layer=layer))
        case {"do": "resume"}:
            return Action("run.resume()", run.resume)
        case {"do": "restart"}:
            return Action("run.restart()", run.restart)
    return Action("panel", lambda: _refuse(message))


def _refuse(message: Json) -> None:
    raise ValueError(f"the browser asked for {message}, which is nothing that a panel does: reload the page.")

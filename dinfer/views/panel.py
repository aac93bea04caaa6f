"""Panel: a run as a live map in a notebook, with the buttons that move it.

The kernel's side: what to show, and who does what a browser asks for. The browser's side is SCRIPTS and panel.css.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import anywidget
from ipywidgets import VBox
from traitlets import Bytes, Dict

from dinfer.plan.ops import PlanError
from dinfer.run.state import MOVING
from dinfer.views.actions import action_of, edit_of
from dinfer.views.cells import CellMap
from dinfer.views.communication import FIGURES, Communication
from dinfer.views.desk import Action, Painter, Worker
from dinfer.views.frame import framed, unframe
from dinfer.views.inspector import Inspector, stamp_of
from dinfer.views.protocol import InspectableRun, RunView
from dinfer.views.status import Json, breakpoints, layout, moment
from dinfer.views.still import still_html
from dinfer.views.still_kv import still_kv

VIEW = "application/vnd.jupyter.widget-view+json"

_HERE = Path(__file__).parent

SCRIPTS = (
    "map.js",
    "heatmap.js",
    "inspector.js",
    "communication.js",
    "controls.js",
    "banner.js",
    "ranks.js",
    "panel.js",
)
"""together they are one module"""


class Panel(anywidget.AnyWidget):
    """The panel of a run: show it as the last line of a cell.

    Several panels may show one run; all follow it, whoever moves it. `close()` takes it off the page and leaves no
    thread, but for an action under way, which ends by itself.
    """

    _esm = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    _css = (_HERE / "panel.css").read_text(encoding="utf-8")

    board = Dict().tag(sync=True)
    """what does not change: see `status.layout`"""
    shown = Dict().tag(sync=True)
    """what does: see `status.status`; with it the cut, the actions under way and errors"""
    cells = Bytes().tag(sync=True)
    """a byte for each (layer, chunk, rank): see `cells`"""
    marks = Dict().tag(sync=True)
    """what is known of single blocks, in words: see `status.marks_text`"""

    def __init__(self, run: InspectableRun) -> None:
        self._run, self._cells = run, CellMap(run.plan)
        self._painter = Painter(self._paint)
        self._worker = Worker("dinfer panel worker", self._painter.touch)
        # Neither is ever behind a step that takes long.
        self._pauser = Worker("dinfer panel pauser", self._painter.touch)
        self._editor = Worker("dinfer panel editor", self._painter.touch)
        self._workers = (self._pauser, self._editor, self._worker)
        self._inspector, self._communication = Inspector(run, self._tell), Communication(run, self._tell)
        self._painted: object = None
        self._answered = 0, ""
        """how many actions had been done when the last one was, and what the run was then"""
        self._frame: VBox | None = None
        super().__init__(board={**layout(run.plan, run.chunk_labels()), "figures": list(FIGURES)})
        self._paint()
        self.on_msg(self._on_message)
        self._unsubscribe: Callable[[], None] | None = run.on_change(self._painter.touch)
        self._painter.touch()  # for what changed between the first picture and the subscription

    def close(self) -> None:
        """Take the panel off the page; the run goes on."""
        if self._unsubscribe:
            self._unsubscribe()
            self._unsubscribe = None
            for worker in self._workers:
                worker.close()
            self._inspector.close()
            self._communication.close()
            self._painter.close()
            if self._frame:
                unframe(self._frame)
        super().close()

    def _paint(self) -> None:
        """Send the run as it is now; the only place that does."""
        self._communication.touch()
        actions = self._actions()
        try:
            standing, stops = self._run.standing(), breakpoints(self._run.breakpoints)
            actions["answer"] = self._answer(standing)
            if standing.over:
                actions["error"] = ""  # what was pressed as the run ended was refused for that very reason
            seen = (standing, stops, actions)
            if seen == self._painted:
                return
            self._painted = seen
            self._inspector.touch()
            shown, drawn, marks = moment(self._run.plan, self._cells, standing)
            shown |= {"breakpoints": stops, **actions}
        except Exception as error:  # there is nobody else to tell
            trouble = f"where the run stands cannot be shown: {error}"
            shown, drawn, marks = {**self.shown, **actions, "error": trouble}, self.cells, self.marks
            self._painted = None
        with self.hold_sync():
            self.shown, self.cells, self.marks = shown, drawn, marks

    def _actions(self) -> Json:
        waiting = self._worker.waiting
        return {
            "working": [action.call for worker in self._workers if (action := worker.current)],
            "waiting": waiting.call if waiting else "",
            "error": "\n".join(worker.error for worker in self._workers if worker.error),
            "done": sum(worker.done for worker in self._workers),
        }

    def _answer(self, standing: RunView) -> str:
        """What the last action has answered; nothing once the run is not what it was asked of, unless it moved then."""
        now = "" if standing.state in MOVING else stamp_of(standing)
        if self._answered[0] != self._worker.done:
            self._answered = self._worker.done, now
        return self._worker.answer if self._answered[1] in ("", now) else ""

    def _on_message(self, _: object, message: Json, __: object) -> None:
        """A button was pressed. Answered at once, so that the browser knows that the kernel listens."""
        self.send({"heard": message.get("id")})
        do = message.get("do")
        looks = {
            "inspect": self._inspector.ask,
            "value": self._inspector.value,
            "figure": self._communication.ask,
            "plotly": self._communication.script,
        }
        if do in looks:
            looks[do](message)
            return
        if do in ("pause", "dismiss"):  # what waits was asked for before, and so is void
            for worker in self._workers:
                worker.forget()
        if do == "pause":
            self._pauser.ask(Action("run.pause()", self._run.pause))
        elif edit := edit_of(self._run, message):
            self._editor.ask(edit)
        elif do != "dismiss":
            self._worker.ask(action_of(self._run, message))
        self._painter.touch()

    def _tell(self, content: Json, buffers: list[bytes] | None = None) -> None:
        """To all browsers that show this panel."""
        self.send(content, buffers)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[Json, Json]:
        """The live view, and a still picture of now for where there is no kernel."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        if VIEW in data:
            self._frame = self._frame or framed(self)
            data = {**data, VIEW: {**data[VIEW], "model_id": self._frame.model_id}}
        try:
            events, _ = self._run.events_since([])
            standing = self._run.standing()
            kv = self._still_kv(standing)
            still = still_html(self._run.plan, standing, self._run.chunk_labels(), events, kv)
        except Exception as error:  # the live view must come nevertheless, and has a banner
            still = escape(f"dinfer: where the run stands cannot be shown: {error}")
        return {**data, "text/html": still}, metadata

    def _still_kv(self, standing: RunView) -> str:
        try:
            return still_kv(self._run, standing)
        except PlanError:  # there is nothing to show
            return ""
        except Exception as error:  # the rest of the picture must come nevertheless
            return f"<div>{escape(f'KV cannot be shown: {error}')}</div>"

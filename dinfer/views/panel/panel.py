"""Panel: a run as a live map in a notebook, with the buttons that move it.

This is the kernel's side: what is shown, and who does what a browser asks for. The browser's side is SCRIPTS and
panel.css.
"""

from collections import deque
from collections.abc import Callable
from html import escape

from traitlets import Bytes, Dict

from dinfer.display import badge
from dinfer.plan.ops import PlanError
from dinfer.run.state import MOVING, RECOVER, Standing, State
from dinfer.severity import Severity
from dinfer.views.cells import CellMap
from dinfer.views.panel.actions import board_of, is_edit, log_of, verb_of
from dinfer.views.panel.communication import Communication
from dinfer.views.panel.desk import Action, Painter, Worker
from dinfer.views.panel.finder import Finder
from dinfer.views.panel.inspector import Inspector, stamp_of
from dinfer.views.panel.kv_tools import KvTools
from dinfer.views.panel.runs import RunsPage
from dinfer.views.panel.scrubber import Scrubber
from dinfer.views.panel.slotted import SlottedWidget, texts_of
from dinfer.views.panel.still_kv import still_kv
from dinfer.views.panel.why import Why
from dinfer.views.protocol import InspectableRun, Json
from dinfer.views.read_only import read_only
from dinfer.views.recorded import RecordedRun
from dinfer.views.status import breakpoints, layout, moment
from dinfer.views.still import still_html


def action_of(run: InspectableRun, message: Json) -> Action:
    """The action for a message that moves the run or asks it something."""
    match message:
        case {"do": ("step" | "step_back") as do, "unit": ("op" | "layer" | "wave" | "chunk") as unit}:
            step = run.step if do == "step" else run.step_back
            return Action(f'run.{do}("{unit}")', lambda: step(unit))
        case {"do": "play", "unit": ("op" | "layer" | "wave" | "chunk") as unit, "per_second": pace} if (
            isinstance(pace, int | float)
        ):
            return Action(f'run.play("{unit}", per_second={pace:g})', lambda: run.play(unit, per_second=pace))
        case {"do": "run_to", "chunk": int(chunk), "layer": int(layer)}:
            call = f"run.run_to(chunk={chunk}, layer={layer})"
            return Action(call, lambda: run.run_to(chunk=chunk, layer=layer))
        case {"do": "undo"}:
            return Action("run.undo()", run.undo, asks=True)
        case {"do": "resume"}:
            return Action("run.resume()", run.resume)
        case {"do": "mend"}:
            return Action(run.standing().remedy or RECOVER, run.mend)
        case {"do": "restart"}:
            return Action("run.restart()", run.restart)
        case {"do": "diff"}:
            return _noted(run, "run.kv().diff()", lambda: run.kv().diff(), asks=True)
        case {"do": "why"}:
            return _noted(run, "run.verdict()", run.verdict, asks=True)
    return Action("panel", lambda: _refuse(message))


def _refuse(message: Json) -> None:
    raise ValueError(f"the browser sent {message}, which the panel does not know: reload the page.")


def edit_of(run: InspectableRun, message: Json) -> Action | None:
    """The action for a message that changes breakpoints or faults, which does not wait for a step; None for others."""
    match message:
        case {"do": "break_at"}:
            return _break_at(run, message)
        case {"do": "remove_breakpoint", "number": int(number)}:
            return Action(f"run.breakpoints.remove({number})", lambda: run.breakpoints.remove(number))
        case {"do": "clear_breakpoints"}:
            return Action("run.breakpoints.clear()", lambda: run.breakpoints.clear())
        case {"do": "clear_faults"}:
            return Action("run.faults.clear()", lambda: run.faults.clear())
    return None


def _noted(run: InspectableRun, call: str, do: Callable[[], object], *, asks: bool = False) -> Action:
    """An action that the run does not record itself: sets its `last_call`."""

    def done() -> object:
        run.last_call = call
        return do()

    return Action(call, done, asks)


def _break_at(run: InspectableRun, message: Json) -> Action:
    """Set a breakpoint; layer, chunk or rank is left out for any, hit for each. `instead`: the breakpoint that it
    replaces, which stays if the new one is refused."""
    given = {name: message[name] for name in ("layer", "chunk", "rank") if isinstance(message.get(name), int)}
    given |= {"when": str(message["when"])} if message.get("when") else {}
    given |= {"hit": message["hit"]} if isinstance(message.get("hit"), int) else {}
    call = f"run.break_at({', '.join(f'{name}={value!r}' for name, value in given.items())})"
    instead = message.get("instead")
    if not isinstance(instead, int):
        return Action(call, lambda: run.break_at(**given))

    def change() -> None:
        run.break_at(**given)
        run.breakpoints.remove(instead)

    return Action(f"{call}; run.breakpoints.remove({instead})", change)


SCRIPTS = (
    "map.js", "heatmap.js", "inspector.js", "kv_tools.js", "communication.js", "controls.js", "banner.js", "why.js",
    "scrubber.js", "find.js", "actions.js", "log.js", "runs.js", "slots.js", "panel.js",
)  # fmt: skip
"""concatenated, they are one module"""


class Panel(SlottedWidget):
    """The panel of a run: display it as the last line of a cell.

    Several panels may show one run; all follow it. `close()` removes the panel from the page and ends its threads; an
    action under way ends by itself.
    """

    _esm = texts_of(SCRIPTS)
    board = Dict().tag(sync=True)
    """what does not change: see `status.layout`"""
    shown = Dict().tag(sync=True)
    """what changes: see `status.status`; also the cut, actions under way and errors"""
    cells = Bytes().tag(sync=True)
    """the state of each (layer, chunk, rank), see `cells`, as `bins.packed` has packed them"""
    marks = Dict().tag(sync=True)
    """notes on single blocks: see `status.moment`"""
    log = Dict().tag(sync=True)
    """the last calls, and what undo would undo: see `actions.log_of`"""

    def __init__(self, run: InspectableRun) -> None:
        self._run, self._cells = run, CellMap(run.plan)
        self._painter = Painter(self._paint)
        # Pauses and edits do not wait for a long step.
        self._worker, self._pauser, self._editor = (
            Worker(f"dinfer panel {name}", self._painter.touch, self._begun)
            for name in ("worker", "pauser", "editor")
        )
        self._workers = (self._pauser, self._editor, self._worker)
        self._inspector, recorded = Inspector(run, self.send), RecordedRun(run)
        self._communication = Communication(run, self.send, recorded)
        self._kv_tools = KvTools(run, self.send)
        self._scrubber, self._finder = Scrubber(run, recorded, self.send), Finder(run, recorded, self.send)
        self._runs = RunsPage(run, self.send)
        self._why = Why(run, self.send)
        self._painted: object = None
        self._before_paint = deque[Callable[[], None]]()
        self._answered = 0, ""
        """the number of actions done when the last one ended, and the stamp of the run then"""
        board = layout(run.plan, run.chunk_labels())
        super().__init__(
            board={
                **board,
                "figures": self._communication.figures,
                "read_only": read_only(run),
                **board_of(run),
            }
        )
        self._paint()
        self.on_msg(self._on_message)
        self._unsubscribe: Callable[[], None] | None = run.on_change(self._painter.touch)
        self._painter.touch()  # the run may have changed before the subscription

    def close(self) -> None:
        """Remove the panel from the page; the run goes on."""
        if self._unsubscribe:
            self._unsubscribe()
            self._unsubscribe = None
            for worker in self._workers:
                worker.close()
            self._inspector.close()
            self._communication.close()
            self._kv_tools.close()
            self._scrubber.close()
            self._finder.close()
            self._runs.close()
            self._why.close()
            self._painter.close()
        super().close()

    def before_paint(self, do: Callable[[], None]) -> None:
        """Call `do()` soon on the thread that sends the run's state: what it sends of that is never older than what was
        sent before. It must not raise."""
        self._before_paint.append(do)
        self._painter.touch()

    def _paint(self) -> None:
        """Send the run as it is now; no other method does."""
        while self._before_paint:
            self._before_paint.popleft()()
        self._communication.touch()
        waiting = self._worker.waiting
        actions: Json = {
            "working": [action.call for worker in self._workers if (action := worker.current)],
            "waiting": waiting.call if waiting else "",
            "done": sum(worker.done for worker in self._workers),
        }
        try:
            standing, stops = self._run.standing(), breakpoints(self._run.breakpoints)
            actions |= self._said(standing)
            log = log_of(self._run)
            seen = (standing, stops, actions, log["count"], log["undo"])
            if seen == self._painted:
                return
            self._painted = seen
            self._inspector.touch()
            self._kv_tools.touch()
            shown, drawn, marks = moment(self._run.plan, self._cells, standing)
            shown |= {"breakpoints": stops, **actions}
        except Exception as error:  # nothing else would report it
            trouble = f"where the run stands cannot be shown: {error}"
            said = {"error": trouble, "error_severity": Severity.ERROR.word}
            shown, drawn, marks, log = {**self.shown, **actions, **said}, self.cells, self.marks, self.log
            self._painted = None
        with self.hold_sync():
            self.shown, self.cells, self.marks, self.log = shown, drawn, marks, log

    def _said(self, standing: Standing) -> Json:
        """What actions have said. Once the run has begun again, that is about a run which there is no more; and of a
        run that is over, what was asked meanwhile was refused for that reason."""
        new = [worker for worker in self._workers if worker.era in (None, standing.begun)]
        failed = [worker for worker in new if worker.error and not standing.over]
        answered = self._worker.severity
        return {
            "error": "\n".join(worker.error for worker in failed),
            "error_severity": max((worker.severity for worker in failed), default=Severity.NOTE).word,
            "answer": self._answer(standing) if self._worker in new else "",
            "answer_severity": answered.word,
        }

    def _answer(self, standing: Standing) -> str:
        """The answer of the last action; "" once the run has changed since, unless it was moving when asked."""
        now = "" if standing.state in (*MOVING, State.HUNG, State.LOST) else stamp_of(standing)
        if self._answered[0] != self._worker.done:
            self._answered = self._worker.done, now
        return self._worker.answer if self._answered[1] in ("", now) else ""

    def _begun(self) -> int | None:
        """How often the run has begun; None if that cannot be found out."""
        try:
            return self._run.standing().begun
        except Exception:  # which `_paint` reports
            return None

    def _on_message(self, _: object, message: Json, __: object) -> None:
        """Handle a browser's message; confirmed at once, so that the browser knows that the kernel is responsive."""
        self.send({"heard": message.get("id")})
        do = message.get("do")
        looks = {
            "inspect": self._inspector.ask,
            "value": self._inspector.value,
            "figure": self._communication.ask,
            "plotly": self._communication.script,
            "kv_tool": self._kv_tools.ask,
            **dict.fromkeys(("runs", "compare_runs", "cell"), self._runs.ask),
            "time": self._scrubber.ask,
            "find": self._finder.ask,
            "explain": self._why.ask,
        }
        if do in looks:
            looks[do](message)
            return
        if do in ("pause", "dismiss"):  # drops actions that still wait
            for worker in self._workers:
                worker.forget()
        if do == "pause":
            self._pauser.ask(Action("run.pause()", self._run.pause))
        elif verb := verb_of(self._run, message):
            (self._editor if is_edit(message) else self._worker).ask(verb)
        elif edit := edit_of(self._run, message):
            self._editor.ask(edit)
        elif do != "dismiss":
            self._worker.ask(action_of(self._run, message))
        self._painter.touch()

    def still(self) -> str:
        try:
            events, _ = self._run.events_since([])
            standing = self._run.standing()
            try:
                kv = still_kv(self._run, standing)
            except PlanError:  # nothing is computed yet
                kv = ""
            except Exception as error:  # the rest of the picture is still shown
                kv = f"<div>{badge(Severity.ERROR)}{escape(f'KV cannot be shown: {error}')}</div>"
            return still_html(self._run.plan, standing, self._run.chunk_labels(), events, kv)
        except Exception as error:  # the live view is still shown, and reports errors
            text = f"dinfer: where the run stands cannot be shown: {error}"
            return f"<div>{badge(Severity.ERROR)}{escape(text)}</div>"

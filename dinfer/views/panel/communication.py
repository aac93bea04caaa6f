"""Communication: live figures of transfers, for browsers that ask for them.

Figures are drawn from a ring of the newest events, so that memory and drawing time stay bounded. As with the inspector,
a browser asks, and is answered once there is something new. plotly's own script is sent once to each page, and never
saved in the notebook.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import plotly.graph_objects as go

from dinfer.run.prediction import figures_beside, prediction_of
from dinfer.run.state import MOVING, STANDING
from dinfer.trace.events import Event, prefill_events
from dinfer.trace.trace import Trace
from dinfer.views.figures.exposure import exposure
from dinfer.views.figures.gantt import gantt
from dinfer.views.figures.latency import distribution, latency
from dinfer.views.figures.matrix import matrix
from dinfer.views.figures.predicted import predicted
from dinfer.views.figures.style import html_config
from dinfer.views.panel.desk import Painter, Wants
from dinfer.views.protocol import InspectableRun, Json
from dinfer.views.recorded import RecordedRun

EVENTS = 6000
"""the newest events, from which figures are drawn"""

LEAST, DRAW_S = 1000, 0.25
"""while a run moves, a figure is drawn from fewer of them, but LEAST, where drawing takes longer than DRAW_S"""

PERIOD_S, MOST_REST_S = 0.1, 0.3
"""between two figures: at least, and at most after one that took long to draw, so that a figure is no older than a
second on busy cores, too"""

FIGURES: dict[str, Callable[..., go.Figure]] = {
    "latency": partial(latency, per_link=100),  # few enough for a browser to draw several times a second
    "distribution": distribution,
    "matrix": matrix,
    "gantt": gantt,
    "exposure": exposure,
}


PREDICTED = "predicted"
"""the figure of runs that the planner has predicted something of"""


class FigureRequest(NamedTuple):
    """The figure that a browser shows; `have`: the number of events it has seen."""

    view: str
    name: str
    dark: bool
    have: int


class Ring:
    """The newest events of prefill. `count`: how many have arrived of this run; `behind`: how many more ops are done,
    whose events have not arrived; `ops`: how many are done whose events have; `is_whole`: whether all ops of the run
    are done and their events here; `seen`: grows with all that is new, also when the run begins again."""

    def __init__(self, run: InspectableRun, most: int = EVENTS) -> None:
        self._run = run
        self._most = self._affordable = self.drawn = most
        self._events: deque[Event] = deque(maxlen=most)
        self._read: list[int] = []
        self._newest: dict[tuple[int, str], int] = {}
        """by rank and lane, the index of its newest event"""
        self.seen = self.count = self.behind = self.ops = 0
        self.is_whole = False
        self.caption = ""
        """from which events figures are drawn, in words"""

    def read(self) -> None:
        """Add new events; start again if the run was restarted."""
        standing = self._run.standing()  # before the events: what is done by then is waited for
        found, read = self._run.events_since(self._read)
        if self._read and read[0] != self._read[0]:
            self._events.clear()
            self._newest.clear()
            self.count = 0
        self._read = read
        new = sorted(prefill_events(found), key=lambda event: event.end)
        self._events.extend(new)
        for event in new:
            if event.index is not None:
                self._newest[event.rank, event.lane] = event.index
        self.count += len(new)
        self.behind = sum(
            max(0, position - 1 - self._newest.get((rank, lane.name), -1))
            for rank, (lanes, stand) in enumerate(zip(self._run.plan.lanes, standing.stands, strict=False))
            for lane, position in zip(lanes, stand.positions, strict=True)
        )
        self.ops = sum(sum(stand.positions) for stand in standing.stands) - self.behind
        moves = standing.state in MOVING
        self.drawn = min(len(self._events), self._affordable if moves else self._most)
        caption = self._caption(may_come=moves or standing.state in STANDING)
        wanted = [tuple(len(lane.ops) for lane in lanes) for lanes in self._run.plan.lanes]
        was_whole, self.is_whole = self.is_whole, wanted == [stand.positions for stand in standing.stands]
        self.is_whole &= not self.behind
        self.seen += len(new) or (caption, self.is_whole) != (self.caption, was_whole)
        self.caption = caption

    def drew(self, seconds: float) -> None:
        """A figure took so long: of a run that moves, the next ones are drawn from as many events as take DRAW_S."""
        affordable = self.drawn * DRAW_S / max(seconds, DRAW_S / 4)
        self._affordable = max(min(LEAST, self._most), min(self._most, int(affordable)))

    def trace(self) -> Trace:
        """The events to draw as a trace. Without earlier events, nothing is known of the time before the first of
        these ended: an op that was ready long before then would look like a bubble since then."""
        events = list(self._events)[len(self._events) - self.drawn :]
        if self.count > len(events):
            since = min(event.end for event in events)
            events = [event if event.kind == "send" else _cut_off(event, since) for event in events]
        return Trace.merge([events])

    def _caption(self, *, may_come: bool) -> str:
        """`may_come`: whether events that have not arrived may still do so."""
        drawn, count = self.drawn, self.count
        if not drawn and not self.behind:
            return "nothing has run yet: press play, or step"
        text = f"{count:,} events of prefill"
        if self.behind:
            text = f"{count:,} of {count + self.behind:,} events of prefill"
            text = f"catching up: {text}" if may_come else f"{text}; the others were lost with their rank"
        if count > drawn:
            text += f"; drawn from the newest {drawn:,}, times count from the first of these"
        return text


class Communication:
    """The figures of one panel. `send(content, buffers)` sends to all its browsers; `figures`: their names, PREDICTED
    among them where something is predicted of the run."""

    def __init__(
        self, run: InspectableRun, send: Callable[..., object], recorded: RecordedRun | None = None
    ) -> None:
        self._send = send
        self._ring, self._recorded = Ring(run), recorded or RecordedRun(run)
        self._prediction = prediction_of(run)
        self.figures = [*FIGURES, *[PREDICTED] * bool(self._prediction)]
        self._painter = Painter(self._serve, "figures", period=PERIOD_S, rest=2.0, longest=MOST_REST_S)
        self._wants = Wants[FigureRequest]()

    def ask(self, message: Json) -> None:
        """A browser asks for a newer figure. Returns at once."""
        name, have = str(message.get("name")), message.get("have")
        if name not in self.figures:
            return
        view, dark = str(message.get("view")), bool(message.get("dark"))
        self._wants[view] = FigureRequest(view, name, dark, have if isinstance(have, int) else -1)
        self._painter.touch()

    def touch(self) -> None:
        """Called when there may be new events."""
        if self._wants:
            self._painter.touch()

    def script(self, message: Json) -> None:
        """Send plotly's script to a page."""
        from plotly.offline import get_plotlyjs

        self._send({"plotly": message.get("view"), "config": html_config()}, [get_plotlyjs().encode()])

    def close(self) -> None:
        """Stop drawing."""
        self._painter.close()

    def _serve(self) -> None:
        self._ring.read()
        ring = self._ring
        for want in self._wants.taken(ring.seen):
            found = {"view": want.view, "name": want.name, "seen": ring.seen, "caption": ring.caption}
            found |= {"events": ring.count, "ops": ring.ops}
            if ring.count:
                began = time.monotonic()
                try:
                    if want.name == PREDICTED:
                        found |= self._predicted(dark=want.dark)
                    else:
                        found["json"] = FIGURES[want.name](ring.trace(), dark=want.dark).to_json()
                        ring.drew(time.monotonic() - began)
                except Exception as error:  # nothing else would report it
                    found["error"] = f"{type(error).__name__}: {error}"
            self._send({"figure": found})

    def _predicted(self, *, dark: bool) -> Json:
        """The figure PREDICTED, of all events: the newest ones do not tell what a rank has computed in all."""
        assert self._prediction
        stood, ring = self._recorded.now(), self._ring
        if stood:
            trace = stood.timeline.trace
        elif ring.count == ring.drawn:
            trace = ring.trace()
        else:  # to be asked again, also where nothing new comes
            return {"seen": -1, "caption": f"{ring.caption}; predicted beside measured once the run stands"}
        figures = figures_beside(self._prediction(), trace)
        why = "" if ring.is_whole else PART_OF_IT
        if not why and has_repeats(trace):
            why = REPEATED
        caption = "; ".join(filter(None, (ring.caption, why)))
        return {"json": predicted(figures, so_far=bool(why), dark=dark).to_json(), "caption": caption}


PART_OF_IT = "predicted: of the whole prefill; measured: so far"

REPEATED = "ops that ran again after a step back are measured each time"


def has_repeats(trace: Trace) -> bool:
    """Whether an op ran more than once, as after a step back."""
    ops = [(event.rank, event.lane, event.index) for event in trace.prefill() if event.index is not None]
    return len(set(ops)) < len(ops)


def _cut_off(event: Event, since: int) -> Event:
    """The event without its waiting before that time; a send's belongs to the latency of its transfer, and is kept."""
    start = min(event.met, max(event.start, since))
    return replace(event, ready=min(start, max(event.ready, since)), start=start)

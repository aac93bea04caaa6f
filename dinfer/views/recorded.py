"""The trace of a run that stands or is over, as views ask for it at any time: read on, and indexed, when asked."""

import threading
from typing import NamedTuple

from dinfer.run.state import MOVING, Standing
from dinfer.trace.events import Event
from dinfer.trace.intervals import length
from dinfer.trace.shares import pauses, without_pauses
from dinfer.trace.trace import Trace
from dinfer.views.protocol import InspectableRun
from dinfer.views.timeline import Timeline


class Recorded(NamedTuple):
    """A run's trace, without the pauses between steps, and where it stands. `key`: another one after each change."""

    timeline: Timeline
    standing: Standing
    key: str


class RecordedRun:
    """What the views of one panel share, so that a trace is indexed once. Only that of the newest events is kept."""

    def __init__(self, run: InspectableRun) -> None:
        self._run, self._lock = run, threading.Lock()
        self._read: list[int] = []
        self._events: list[Event] = []
        self._timeline: Timeline | None = None
        shape = run.plan.shape
        self._shape = shape.layers, len(shape.chunks), run.world_size

    def now(self) -> Recorded | None:
        """The trace so far, and where the run stands; None while it moves."""
        with self._lock:
            standing = (
                self._run.standing()
            )  # before the events: what is done by then is among them, or on its way
            if standing.state in MOVING:
                return None
            found, read = self._run.events_since(self._read)
            if self._read[:1] != read[:1]:  # it has begun again
                self._events, self._timeline = [], None
            if found or self._timeline is None:
                self._events += found
                trace = Trace.merge([self._events])
                self._timeline = Timeline(without_pauses(trace), self._shape, length(pauses(trace)))
            self._read = read
            stands = tuple((tuple(stand.positions), tuple(stand.started)) for stand in standing.stands)
            return Recorded(self._timeline, standing, f"{hash((tuple(read), stands, standing.state)):x}")

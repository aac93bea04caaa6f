"""The events of one run as they arrive from its ranks, and their merged trace."""

import time
from collections.abc import Sequence
from itertools import islice

from dinfer.plan.cut import Cut, is_inside, meet
from dinfer.run.result import merge
from dinfer.run.state import STANDING, RunState
from dinfer.trace.clocks import moved
from dinfer.trace.events import Event
from dinfer.trace.trace import Trace

WAIT_S = 0.2

LATE_S = 2.0
"""how long the events of finished ops may take to arrive"""


class RunEvents:
    """By rank, in the order of arrival."""

    def __init__(self, state: RunState) -> None:
        self._read: list[int] = []  # by `note_nonfinite`
        self._state, self._ranks, self._lanes = state, state.ranks, state.plan.lanes
        self._begun = 0  # how often the run has begun
        self._by_rank: list[list[Event]] = []
        self._back: tuple[list[int], Cut] = [], ()
        """how many events there were when the run last went back, and the cut to which it went"""

    def begin(self) -> None:
        """The run begins, or begins again."""
        with self._ranks.changed:
            self._by_rank = [state.events for state in self._ranks.ranks]
            self._back = [0] * len(self._by_rank), tuple((0,) * len(lanes) for lanes in self._lanes)
            self._begun += 1

    def take_over(self) -> None:
        """Wait until the ranks have repeated the events of an earlier session."""
        deadline = time.monotonic() + LATE_S
        with self._ranks.changed:
            while not self._is_whole() and time.monotonic() < deadline:
                self._ranks.changed.wait(WAIT_S)
            # The newest may be of an op behind the cut, where that session has gone back.
            self._back = list(map(len, self._by_rank)), tuple(one.positions for one in self._state.stands())

    def went(self, before: Cut, after: Cut) -> None:
        """The run went from one cut to another: ops behind a cut to which it went back will be done again."""
        if not is_inside(before, after):
            with self._ranks.changed:
                self._back = list(map(len, self._by_rank)), meet(before, after)

    def note_nonfinite(self) -> None:
        """Tell the run's state of NaN and Inf in the events that have come since the last time."""
        with self._ranks.changed:
            new, self._read = self.since(self._read)
            self._state.nonfinite.take(new)

    def wait(self) -> None:
        """Of a run that stands still, wait for events that are still on their way."""
        deadline = time.monotonic() + LATE_S
        with self._ranks.changed:
            while self._state.now in STANDING and not self._is_whole() and time.monotonic() < deadline:
                self._ranks.changed.wait(WAIT_S)

    def trace(self) -> Trace:
        """The events of all ranks so far. Of a run that stands still, first waits for events still on their way."""
        self.wait()
        with self._ranks.changed:
            by_rank = [list(events) for events in self._by_rank]
        # Without the lock, which every lane of a rank on threads takes.
        return merge(self._state.job, by_rank, self._ranks.ranks)

    def since(self, read: Sequence[int]) -> tuple[list[Event], list[int]]:
        """The events after those that have been `read`, and the new `read`: how often the run has begun, and the number
        of events of each rank. All events of a run that has begun again."""
        with self._ranks.changed:
            first = read[1:] if read and read[0] == self._begun else [0] * len(self._by_rank)
            new = [
                event
                for n, events, state in zip(first, self._by_rank, self._ranks.ranks, strict=True)
                for event in moved(events[n:], state.clock)
            ]
            return new, self.heard()

    def heard(self) -> list[int]:
        """How often the run has begun, and the number of events of each rank since."""
        return [self._begun, *map(len, self._by_rank)]

    def _is_whole(self) -> bool:
        """Whether the newest event of each lane since the run went back is that of the last op that is done."""
        heard, cut = self._back
        for rank, stand in enumerate(self._state.stands()):
            done = {
                lane.name: position - 1
                for lane, position, first in zip(self._lanes[rank], stand.positions, cut[rank], strict=True)
                if position > first
            }
            events = self._by_rank[rank]
            for event in islice(reversed(events), len(events) - heard[rank]):
                if not done:
                    break
                if event.lane in done and done.pop(event.lane) != event.index:
                    return False
            if done:
                return False
        return True

"""Sight: what there is to see of a run, at any moment and whatever the ranks do. Nothing here moves it."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from dinfer.engine.corruption import Corruption
from dinfer.engine.hosting.commands import Message
from dinfer.model.text import texts_of
from dinfer.plan.cut import Cut, is_inside, meet
from dinfer.session.job import Job
from dinfer.session.ranks import Ranks
from dinfer.session.result import merge
from dinfer.session.runs.action import Acting
from dinfer.session.runs.armed import Armed
from dinfer.session.runs.generation import Generation
from dinfer.session.runs.lent import Lent
from dinfer.session.runs.marks import Marks
from dinfer.session.runs.standing import Standing, State, state_of_lanes
from dinfer.session.runs.where import where_text
from dinfer.session.said import Said, Where, listed
from dinfer.trace.events import Event
from dinfer.trace.trace import Trace

ANSWER_S = 30.0
WAIT_S = 0.2
LATE_S = 2.0
"""how long news of what has been done may take"""


class Sight(Acting, Said):
    """Of one run. `devices` are the ranks'; a run that begins anew calls `_look_anew`. `show`, which a session has from
    views, makes the panel that a run is as the last line of a cell."""

    show: Callable[[Any], Any] | None = None

    def __init__(self, job: Job, line: Ranks, devices: list[str], tokenizer: Any | None) -> None:
        super().__init__()
        self.job, self.plan, self.config = job, job.plan, job.config
        self.world_size = job.plan.world_size
        self.edited: list[str] = []
        self.corrupt: list[Corruption] = []
        """blocks whose bytes have changed, in the order in which they were found"""
        self.silence = ""
        """which rank does not answer, while that is so"""
        self._line, self._devices, self._tokenizer = Lent(line), devices, tokenizer
        self._generation = Generation(self._line, self.check, tokenizer)
        self._events: list[list[Event]] = []
        self._marks, self._begun = Marks(), 0
        self._back: tuple[list[int], Cut] = [], ()
        """how many events there were when the run last went back, and to where"""
        self._armed = Armed(lambda faults: self._ask_all("faults", faults=faults), self.say)

    def _look_anew(self) -> None:
        self._line.new_notes()
        self.message = self.failure = self.silence = ""
        self.edited, self.corrupt, self._marks = [], [], Marks()
        self._armed.begin_anew()
        self._generation = Generation(self._line, self.check, self._tokenizer)
        self._events = [state.events for state in self._line.ranks]
        self._back = [0] * self.world_size, tuple((0,) * len(lanes) for lanes in self.plan.lanes)
        self._begun += 1

    @property
    def hang(self) -> str:
        """Why the run does not move, where that is known."""
        return ""

    def why(self) -> str:
        """The same at length."""
        return ""

    @property
    def tokens(self) -> list[int]:
        """New tokens so far, the same on every rank."""
        return list(self._generation.tokens)

    @property
    def text(self) -> str:
        """The text of the new tokens, in whole characters."""
        return self._generation.text

    def where(self) -> Where:
        """Where each rank stands, a line each."""
        standing = self.standing()
        lines = where_text(self.plan, standing.stands) if standing.stands else "the ranks have not said yet"
        notes = [standing.message] * bool(standing.message)
        notes += [f"{len(self.tokens)} new tokens: {self.text!r}"] * bool(self.tokens)
        notes += [f"edited by hand: {', '.join(self.edited)}"] * bool(self.edited)
        unsaid = [text for text in map(str, self.corrupt) if text not in standing.message]
        notes += [f"changed bytes: {listed(unsaid)}"] * bool(unsaid)
        notes += standing.faults
        return Where(standing.state, "\n".join([lines, *notes]))

    def __str__(self) -> str:
        plan, chunks = self.plan, len(self.plan.shape.chunks)
        head = f"{len(self.job.ids)} tokens in {chunks} chunks, {plan.schedule}, {plan.sync_strategy}"
        return f"run of {head}: {self.where()}"

    def _repr_mimebundle_(self, **_: Any) -> Any:
        """Where there is a browser to show it, the panel beside the text; elsewhere the text alone."""
        if self.show is None or self.closed or not _in_notebook():
            return {}
        data, metadata = self.show(self)._repr_mimebundle_()
        return {**data, "text/plain": str(self)}, metadata

    @property
    def trace(self) -> Trace:
        """The events of all ranks so far; of a run that stands, all of them."""
        deadline = time.monotonic() + LATE_S
        with self._line.changed:
            while (
                self._state() in ("paused", "done") and not self._is_whole() and time.monotonic() < deadline
            ):
                self._line.changed.wait(WAIT_S)
            return merge(self.job, self._events)

    def _is_whole(self) -> bool:
        """Whether the newest event of each lane, since the run went back, is that of the op before which it stands."""
        heard, cut = self._back
        for rank, stand in enumerate(self.standing().stands):
            newest = {event.lane: event.index for event in self._events[rank][heard[rank] :]}
            lanes = zip(self.plan.lanes[rank], stand.positions, cut[rank], strict=True)
            if any(
                position > first and newest.get(lane.name) != position - 1 for lane, position, first in lanes
            ):
                return False
        return True

    def _went(self, before: Cut, after: Cut) -> None:
        """Ops behind a cut that the run has gone back to will be done again, and told of again."""
        if not is_inside(before, after):
            with self._line.changed:
                self._back = list(map(len, self._events)), meet(before, after)

    def events_since(self, read: Sequence[int]) -> tuple[list[Event], list[int]]:
        """The events after those that have been `read`, and what has been read then: how often the run has begun anew,
        and how many events of each rank. Of a run that has begun anew, all of them."""
        with self._line.changed:
            first = read[1:] if read and read[0] == self._begun else [0] * self.world_size
            found = [e for n, events in zip(first, self._events, strict=True) for e in events[n:]]
            return found, self.events_heard()

    def events_heard(self) -> list[int]:
        """How often the run has begun anew, and how many events of each rank have come since."""
        return [self._begun, *map(len, self._events)]

    def standing(self) -> Standing:
        """The run at this moment; returns at once."""
        with self._line.changed:
            stands = tuple(state.stand for state in self._line.ranks if state.stand)
            alive = tuple(not state.gone for state in self._line.ranks)
            memory = tuple(state.memory for state in self._line.ranks)
            device_memory = tuple(state.device_memory for state in self._line.ranks)
            tokens = tuple(state.decoded for state in self._line.ranks)
        return Standing(
            stands if len(stands) == self.world_size else (),
            self._state(),
            self.failure or self.closed or self.silence or self.hang or self.message,
            len(self.tokens),
            self.text,
            tuple(self._devices),
            alive,
            self.last_call,
            tuple(map(str, self._armed)),
            self._marks.of(self._armed),
            memory,
            tokens,
            self.why(),
            device_memory,
            self.closed,
        )

    def chunk_labels(self) -> list[str]:
        """The text of each chunk, in whole characters; empty where there is no tokenizer."""
        return texts_of(self._tokenizer, self.job.ids, self.plan.shape.chunks)

    def sha256(self) -> list[str]:
        """SHA-256 of the KV that each rank holds of the prompt, once prefill is done."""
        answers = self._ask_all("sha256", tokens=len(self.job.ids))
        return [answers[rank]["sha256"] for rank in range(self.world_size)]

    def _ask_all(self, do: str, **fields: Any) -> dict[int, Message]:
        requests = {rank: {"do": do, **fields} for rank in range(self.world_size)}
        return self._line.ask(requests, ANSWER_S, self.check)

    def _state(self) -> State:
        if self.failure or self.closed:
            return "failed" if self.failure else "closed"
        if self._generation.under_way:
            return "decoding"
        return state_of_lanes(self.plan, [state.stand for state in self._line.ranks if state.stand])


def _in_notebook() -> bool:
    """Whether this process is a kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")

"""Sight: what there is to see of a run, at any moment and whatever the ranks do. Nothing here moves it."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, TypeVar

from dinfer.cluster.lease import RankLease, RunOver, over_text
from dinfer.cluster.ranks import RankRefused, Ranks
from dinfer.display import Displayable, listed
from dinfer.engine.board import DeviceMemory, Stand
from dinfer.engine.corruption import Corruption
from dinfer.job import Job
from dinfer.kv.difference import Diff
from dinfer.kv.source import Selection
from dinfer.messages import Answer, Command, HashKv, SetFaults
from dinfer.model.text import texts_of
from dinfer.plan.cut import Cut, is_inside, meet
from dinfer.plan.plan import Plan
from dinfer.results import Where
from dinfer.run.action import Acting
from dinfer.run.decode import Generation
from dinfer.run.faults import Armed, Injected
from dinfer.run.fleet import RankFailed
from dinfer.run.result import merge
from dinfer.run.stepper import NoProgress
from dinfer.trace.events import Event
from dinfer.trace.trace import Trace
from dinfer.verdict.where import where_text

A = TypeVar("A", bound=Answer)

RankBlock = tuple[int, int, int]
"""(rank, chunk, layer)"""


class Mark(NamedTuple):
    """`text` says what is known, for people."""

    rank: int
    chunk: int
    layer: int
    kind: Literal["armed", "differs", "corrupt"]
    text: str


class Marks:
    """Those of one run. What a block is known to hold holds until it is compared anew, or until the run goes back
    before it."""

    def __init__(self) -> None:
        self._known: dict[RankBlock, Mark] = {}

    def of(self, faults: Iterable[Injected]) -> tuple[Mark, ...]:
        """All of them, those of armed faults too."""
        return (*_armed(faults), *self._known.values())

    def note_corrupt(self, found: Corruption) -> None:
        """A rank has found that a block has changed."""
        block = (found.rank, found.chunk, found.layer)
        self._known[block] = Mark(*block, "corrupt", str(found))

    def note_diff(self, found: Diff, chosen: Selection) -> None:
        """The ranks have been compared: of what was compared, this is what is known now."""
        known = dict(self._known)
        for block in self._known:
            rank, chunk, layer = block
            if rank in chosen.ranks and chunk in chosen.spans and layer in chosen.layers:
                del known[block]
        for one in reversed(found.differences):  # a block is named by its first
            if one.chunk is not None:
                block = (one.rank, one.chunk, one.layer)
                known[block] = Mark(*block, "differs", str(one))
        self._known = known

    def went(self, plan: Plan, before: Cut, after: Cut) -> None:
        """Forget what is known of blocks that are no longer there."""
        for rank, lanes in enumerate(plan.lanes):
            for lane, was, now in zip(lanes, before[rank], after[rank], strict=True):
                for op in lane.ops[now:was]:
                    if op.kind == "layer" or (op.kind == "recv" and op.what == "kv"):
                        self._known.pop((rank, op.chunk, op.layer), None)


def _armed(faults: Iterable[Injected]) -> Sequence[Mark]:
    return [
        Mark(one.fault.rank, one.fault.chunk, one.fault.layer, "armed", str(one))
        for one in faults
        if one.fault.rank is not None
    ]


State = Literal["starting", "running", "paused", "done", "decoding", "failed", "closed"]

MOVING: tuple[State, ...] = ("starting", "running", "decoding")


class Standing(NamedTuple):
    """`stands` are by rank, empty until all have said where they stand; `message`: why the run stopped or failed."""

    stands: tuple[Stand, ...]
    state: State
    message: str
    decoded: int
    text: str
    devices: tuple[str, ...]
    alive: tuple[bool, ...]
    last_call: str
    faults: tuple[str, ...] = ()
    """a line for each that is armed"""
    marks: tuple[Mark, ...] = ()
    """what is known of single blocks"""
    memory: tuple[int | None, ...] = ()
    """bytes that each rank's process has in its host's memory; None where it has none of its own"""
    tokens: tuple[int, ...] = ()
    """how many new tokens each rank has"""
    verdict: str = ""
    """why the run does not move, at length, once that was told"""
    device_memory: tuple[DeviceMemory | None, ...] = ()
    """what each rank's process has of its GPU; None where it has none of its own"""
    over: str = ""
    """why nothing moves this run any more, and what to do, once that is so"""


def state_of_lanes(plan: Plan, stands: Sequence[Stand]) -> State:
    """What the lanes' positions and limits say; `stands` are those of all ranks, or fewer at the start."""
    if len(stands) < plan.world_size:
        return "starting"
    if not all(stand.at_limits and not any(stand.started) for stand in stands):
        return "running"
    ended = all(
        stand.positions == tuple(len(lane.ops) for lane in lanes)
        for stand, lanes in zip(stands, plan.lanes, strict=True)
    )
    return "done" if ended else "paused"


ANSWER_S = 30.0

WAIT_S = 0.2

LATE_S = 2.0
"""how long news of what has been done may take"""


class RunState(Acting, Displayable):
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
        self._line, self._devices, self._tokenizer = RankLease(line), devices, tokenizer
        self._generation = Generation(self._line, self.check, tokenizer)
        self._events: list[list[Event]] = []
        self._marks, self._begun = Marks(), 0
        self._back: tuple[list[int], Cut] = [], ()
        """how many events there were when the run last went back, and to where"""
        self._armed = Armed(lambda faults: self._ask_all(SetFaults(tuple(faults))), self.say)

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
        answers = self._ask_all(HashKv(len(self.job.ids)))
        return [answers[rank].sha256 for rank in range(self.world_size)]

    def _ask_all(self, command: Command[A]) -> dict[int, A]:
        return self._line.ask(dict.fromkeys(range(self.world_size), command), ANSWER_S, self.check)

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


POLL_S = 0.05

END_S = 10.0
"""how long a run that ends waits for what is under way to end first"""


class HoldingRun(RunState):
    """Part of a run."""

    _ending = ""
    """why it is about to be over"""

    def close(self, why: str) -> None:
        """It is over. Its ranks are brought to a stand, as far as they can be, and asked no more; what was seen of them
        last is kept."""
        if self.closed:
            return
        self._ending = why
        try:
            with self.halted(END_S):
                self._line.give_back(why)
                super().close(why)
        finally:
            self._ending = ""

    @contextmanager
    def halted(self, timeout: float = float("inf")) -> Iterator[None]:
        """Stop what is under way, and let no action begin meanwhile. A run that cannot be brought to a stand, since it
        has failed or hangs, is left as it is; who cannot be stopped is waited for so many seconds."""
        deadline = time.monotonic() + timeout
        while not (held := self._lock.acquire(timeout=POLL_S)) and time.monotonic() < deadline:
            self._stop()
        try:
            self._stop()
            yield
        finally:
            if held:
                self._lock.release()

    def _stop(self) -> None:
        if self._state() in MOVING:
            with suppress(RankFailed, RankRefused, NoProgress, TimeoutError):
                self._pause()

    def _pause(self) -> None:
        """Stop the run, or the action under way, at the nearest cut."""
        raise NotImplementedError

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait until the run stands, and let no action move it meanwhile. Raises RuntimeError for a run that is over,
        and as `check` does for one that moves and cannot go on."""
        self._settle()
        while not self._held_still():
            self._settle()
        try:
            yield
        finally:
            self._lock.release()

    def _held_still(self) -> bool:
        """Take the lock of a run that stands. Another action may have come first, which then is waited for as any."""
        if not self._lock.acquire(timeout=POLL_S):
            return False
        if self._state() not in MOVING:
            return True
        self._lock.release()
        return False

    def _settle(self) -> None:
        """Wait until nothing moves."""
        while self._state() in MOVING:
            with self._line.changed:
                self._line.changed.wait(POLL_S)
            self.check()
        if self.closed:
            raise RunOver(over_text(self.closed))

    def check_looking(self) -> None:
        """Raises RunOver where the run is about to be over, which waits for whoever looks at it."""
        if self._ending:
            raise RunOver(over_text(self._ending))

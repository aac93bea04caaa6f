"""The ranks as a session reaches them, be they processes or threads: commands to them, and what they report."""

import itertools
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, cast

from dinfer.config import Backend
from dinfer.engine.board import DeviceMemory, Phase, Stand
from dinfer.errors import DinferError, NoAnswer, NotPossible
from dinfer.messages import (
    AllStands,
    Answer,
    AskStands,
    BatchResult,
    Command,
    Comparing,
    Failed,
    Gone,
    HandedOn,
    Lanes,
    Loading,
    MeasuredForRun,
    Note,
    RankMeasured,
    RankReport,
    Refused,
    Reply,
    Status,
    StoreAddress,
    StoreOpened,
    Struck,
    TextPiece,
    ToldToEnd,
)
from dinfer.trace.clocks import HostClock
from dinfer.trace.events import Event
from dinfer.verdict.where import rank_spans_text

A = TypeVar("A", bound=Answer)

DEFAULT_N = 3
"""how many ranks a session has by default"""

STOPPED_S = 0.9
"""A process that has been stopped for less is not called stopped: a debugger may stop it in passing."""

REFUSED_S = 0.5
"""How long to wait for the others' answers once a rank has refused: they may wait for it forever."""

ASK_S = 0.2
"""How often whoever waits for an answer checks whether the run can still go on."""


class RankRefused(DinferError, RuntimeError):
    """A rank's answer to a command is an error; the message names the rank."""


@dataclass
class RankState:
    """What is known of one rank. Times are this process's monotonic seconds."""

    stand: Stand | None = None
    phase: Phase = "starting"
    decoded: int = 0
    process: str | None = None
    cpu_s: float | None = None
    wants_cpu: float = 0.0
    """for which share of the last seconds one of its threads was ready to run"""
    thread_cpu: float | None = None
    """and the share of a core that its busiest thread used; None while that is not known"""
    memory: int | None = None
    """bytes that its process uses of its host's memory"""
    device_memory: DeviceMemory | None = None
    """and of its GPU's"""
    heard: float = 0.0
    progressed: float = field(default_factory=time.monotonic)
    stopped: float | None = None
    """since when its process is stopped (SIGSTOP)"""
    gone: bool = False
    clock: HostClock | None = None
    """of its events, where that is another than this process's"""
    lanes: tuple[str, ...] = ()
    events: list[Event] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    error: Failed | None = None
    """why its run cannot go on"""
    handed_on: str = ""
    """the session that has taken over its engine"""
    loading: Loading | None = None
    comparing: Comparing | None = None
    struck: Struck | None = None
    store: StoreOpened | None = None
    measured: RankMeasured | None = None
    """of a run whose parameters are to be chosen"""
    result: BatchResult | None = None
    told_to_end: bool = False


def taken_over(ranks: Sequence[RankState]) -> str:
    """That another session has taken over these ranks' engines; "" where none has."""
    to = next((state.handed_on for state in ranks if state.handed_on), "")
    return to and (
        f"taken over: the session of {to} has these engines now, with model and run. Go on there, or take them back "
        "with dinfer.connect(…, take=True)."
    )


class Pending(dict[int, int], Generic[A]):
    """Requests that have been sent: by rank, the number under which its answer will come."""


class RankStates(ABC):
    """The ranks of a session and what they report. How a rank is reached is the subclass's `_send`."""

    def __init__(self, world_size: int) -> None:
        self.ranks = [RankState() for _ in range(world_size)]
        self.changed = threading.Condition()
        self._texts: list[TextPiece] = []
        self._replies: dict[int, Reply | Refused] = {}
        self._awaited = set[int]()
        """numbers of requests whose answers somebody waits for; others are dropped"""
        self._numbers = itertools.count(1)

    # -- to the ranks

    @abstractmethod
    def _send(self, rank: int, command: Command[Any], number: int) -> None:
        """Send request `number` to one rank; its answer will be passed to `take`."""

    def send(self, rank: int, command: Command[Any]) -> None:
        """Send one rank a command whose answer nobody waits for."""
        self._send(rank, command, next(self._numbers))

    def begin(self, requests: Mapping[int, Command[A]]) -> Pending[A]:
        """Send one command to each of these ranks, together; what `finish` takes."""
        pending = Pending[A]((rank, next(self._numbers)) for rank in requests)
        with self.changed:
            self._awaited.update(pending.values())
        for rank, command in requests.items():
            self._send(rank, command, pending[rank])
        return pending

    def finish(
        self, pending: Pending[A], timeout: float, check: Callable[[], None] = lambda: None
    ) -> dict[int, A]:
        """The answers to what was begun.

        `check()` is called while waiting, and may raise. Raises NoAnswer after `timeout` seconds, and RankRefused where
        a rank refuses, though others may not have answered: they may wait for it.
        After a KeyboardInterrupt it may be called again; who does not must call `forget`.
        """
        deadline, refused_at = time.monotonic() + timeout, math.inf
        try:
            while True:
                answered, now = self._is_answered(pending), time.monotonic()
                with self.changed:
                    replies = [(rank, self._replies.get(number)) for rank, number in pending.items()]
                came = {rank: reply for rank, reply in replies if reply}
                if answered or now - refused_at >= REFUSED_S:
                    break
                check()
                if any(isinstance(reply, Refused) for reply in came.values()):
                    refused_at = min(refused_at, now)
                elif now > deadline:
                    silent = rank_spans_text(pending.keys() - came.keys())
                    raise NoAnswer(f"no answer from {silent} within {timeout:g} s")
        except KeyboardInterrupt:  # what has come so far does not come again
            raise
        except BaseException:
            self.forget(pending)
            raise
        self.forget(pending)
        found = dict[int, A]()
        for rank, reply in came.items():
            if isinstance(reply, Refused):
                named = "" if reply.error.startswith(f"rank {rank} ") else f"rank {rank}: "
                raise RankRefused(named + reply.error)
            found[rank] = cast(A, reply.answer)
        return found

    def collect(self, pending: Pending[A]) -> dict[int, A]:
        """The answers that have come to what was begun, without waiting; who has answered, or refused, is taken out of
        `pending`."""
        with self.changed:
            numbers = {rank: number for rank, number in pending.items() if number in self._replies}
            self._awaited.difference_update(numbers.values())
            replies = {rank: self._replies.pop(pending.pop(rank)) for rank in numbers}
        return {rank: cast(A, reply.answer) for rank, reply in replies.items() if isinstance(reply, Reply)}

    def ask(
        self, requests: Mapping[int, Command[A]], timeout: float, check: Callable[[], None] = lambda: None
    ) -> dict[int, A]:
        """Send one command to each of these ranks, together; their answers. Raises as `finish` does."""
        pending = self.begin(requests)
        try:
            return self.finish(pending, timeout, check)
        finally:
            self.forget(pending)

    def forget(self, pending: Pending[Any]) -> None:
        """Nobody waits for these answers any more."""
        with self.changed:
            self._awaited.difference_update(pending.values())
            for number in pending.values():
                self._replies.pop(number, None)

    # -- from the ranks

    def take(self, rank: int, report: RankReport, events: Sequence[Event] = ()) -> None:
        """Keep what a rank reports, and the ops that have ended since its last report."""
        state = self.ranks[rank]
        with self.changed:
            state.heard = time.monotonic()
            state.events += events
            match report:
                case Status():
                    update(state, report)
                case Lanes():
                    state.lanes, state.events, state.error = report.lanes, [], None
                case Reply() | Refused():
                    if report.number in self._awaited:
                        self._replies[report.number] = report
                case TextPiece():
                    self._texts.append(report)
                case Note():
                    state.notes.append(report)
                case AskStands():
                    self.send(rank, AllStands(report.question, tuple(state.stand for state in self.ranks)))
                case Gone():
                    state.gone = True
                case Failed():
                    state.error = report
                case HandedOn():
                    state.handed_on = report.to
                case Loading():
                    state.loading = report
                case Comparing():
                    state.comparing = report
                case Struck():
                    state.struck = report
                case StoreOpened():
                    state.store = report
                case MeasuredForRun():
                    state.measured = report.found
                case BatchResult():
                    state.result = report
                case ToldToEnd():
                    state.told_to_end = True
            self.changed.notify_all()

    def new_texts(self) -> list[TextPiece]:
        """The pieces of generated text that have come since the last call."""
        with self.changed:
            texts, self._texts = self._texts, []
            return texts

    def new_notes(self) -> list[tuple[int, Note]]:
        """What ranks have noted since the last call, each with its rank."""
        with self.changed:
            notes = [(rank, note) for rank, state in enumerate(self.ranks) for note in state.notes]
            for state in self.ranks:
                state.notes = []
            return notes

    def reset(self, rank: int) -> None:
        """Forget a rank that is started again."""
        with self.changed:
            self.ranks[rank] = RankState()
            self.changed.notify_all()

    def _is_answered(self, pending: Pending[Any]) -> bool:
        """Whether all these answers are there; waits a little for the next report if not."""
        with self.changed:
            return self.changed.wait_for(lambda: all(n in self._replies for n in pending.values()), ASK_S)


def update(state: RankState, status: Status) -> None:
    """Take over where a rank stands and how its process is."""
    if (status.stand, status.phase, status.decoded) != (state.stand, state.phase, state.decoded):
        state.progressed = state.heard
    state.stand, state.phase, state.decoded = status.stand, status.phase, status.decoded
    state.process, state.cpu_s, state.wants_cpu = status.process, status.cpu_s, status.wants_cpu
    state.thread_cpu = status.thread_cpu
    state.memory, state.device_memory = status.memory, status.device_memory
    if state.process not in ("T", "t"):
        state.stopped = None
    elif state.stopped is None:
        state.stopped = state.heard


class Ranks(RankStates):
    """The interface of both kinds of ranks: engines and threads."""

    backend: Backend = "auto"
    """what a run's backend "auto" means here"""

    can_kill = True
    """Whether one rank can be killed and started again."""

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @abstractmethod
    def describe(self) -> str:
        """One line for people."""

    def exits(self) -> list[int | None]:
        """By rank, the exit status of a process that has ended, else None."""
        return [None] * self.world_size

    @abstractmethod
    def cores(self) -> list[int]:
        """By rank, how many ranks share its host."""

    @abstractmethod
    def meeting(self) -> StoreAddress:
        """Where the ranks' group is to meet; port 0: any free one."""

    def silent(self) -> list[int]:
        """Ranks that do not answer, though their process has not ended."""
        return []

    def in_cells(self, among: Sequence[int], patience: float) -> list[int]:  # noqa: ARG002 - threads have no cells
        """Those of these ranks whose process still runs a cell after so many seconds."""
        return []

    def interrupt(self, rank: int) -> None:
        """As the stop button does, interrupt the cell that one rank runs, if it can run any."""

    @abstractmethod
    def kill(self, rank: int) -> None:
        """Kill one rank's process."""

    @abstractmethod
    def revive(self, rank: int) -> None:
        """Start one rank again under its number."""

    @abstractmethod
    def listen_for_debugger(self, rank: int, port: int) -> tuple[str, int]:
        """Let a client of debugpy attach to one rank. Returns its host and port."""

    def watch(self, folder: str, *, compare: bool = False) -> None:  # noqa: ARG002 - see the message
        """Have every rank record its calls of torch.distributed into a folder; `compare`: and what a comparison with a
        reference needs. Raises NotPossible."""
        raise NotPossible(
            "ranks in threads of this process cannot be watched one by one: connect to engines for that."
        )

    def free(self) -> None:
        """Wake all that is blocked in the transport, where that can be done from here."""

    def share_weights(self) -> None:
        """Let ranks of one process use one copy of the weights."""

    def identities(self) -> frozenset[Any]:
        """What tells the ranks' processes from all others; empty for ranks that no other session can have."""
        return frozenset()

    def leave(self) -> None:
        """Another session has taken over: give back what reached the ranks. They can be asked nothing more."""

    @abstractmethod
    def close(self) -> None:
        """End the session's hold on the ranks; a cluster that it started ends."""


class AskableRanks(Protocol):
    """What asking and watching needs of ranks: the session's `Ranks` have it, and a run's `RankLease`."""

    ranks: list[RankState]
    changed: threading.Condition

    def ask(
        self, requests: Mapping[int, Command[A]], timeout: float, check: Callable[[], None] = ...
    ) -> dict[int, A]: ...
    def begin(self, requests: Mapping[int, Command[A]]) -> Pending[A]: ...
    def finish(
        self, pending: Pending[A], timeout: float, check: Callable[[], None] = ...
    ) -> dict[int, A]: ...
    def collect(self, pending: Pending[A]) -> dict[int, A]: ...
    def forget(self, pending: Pending[Any]) -> None: ...


LOST = 256
"""Exit status of a process of which it is only known that it has ended."""

ANSWER_S = 0.5


def answers(ranks: AskableRanks, requests: Mapping[int, Command[A]], timeout: float) -> dict[int, A]:
    """The answers of those ranks that answer in time and do not refuse; all are asked together."""
    begun = ranks.begin(requests)
    deadline = time.monotonic() + timeout
    found = dict[int, A]()
    for rank, number in begun.items():
        with suppress(TimeoutError, RankRefused):
            one = Pending[A]({rank: number})
            found |= ranks.finish(one, max(0.0, deadline - time.monotonic()))
    return found

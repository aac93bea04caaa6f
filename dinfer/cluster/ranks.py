"""Ranks: what a session needs of the processes, or threads, that are its ranks, beside what they say of themselves."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from dinfer.engine.board import DeviceMemory, Stand
from dinfer.errors import DinferError, NoAnswer
from dinfer.messages import Message
from dinfer.rank.commands import stand_fields, stand_of
from dinfer.trace.events import Event

STOPPED_S = 0.9
"""how long a rank's process has been stopped before anybody calls it so: a debugger may stop it in passing"""

REFUSED_S = 0.5
"""how long to listen for the others once a rank has refused: they may wait for it for ever"""

ASK_S = 0.2
"""how often someone who waits for an answer looks whether the run can still go on"""


class RankRefused(DinferError, RuntimeError):
    """A rank's answer to a command is an error; the message names the rank."""


@dataclass
class RankState:
    """What is known of one rank. Times are this process's monotonic seconds."""

    stand: Stand | None = None
    phase: str = "starting"
    decoded: int = 0
    process: str | None = None
    cpu_s: float | None = None
    wants_cpu: float = 0.0
    """for how much of the last seconds one of its threads was ready to run, of 1"""
    memory: int | None = None
    """bytes that its process has in its host's memory"""
    device_memory: DeviceMemory | None = None
    """and in that of its GPU"""
    heard: float = 0.0
    progressed: float = field(default_factory=time.monotonic)
    stopped: float | None = None
    """since when its process is stopped (SIGSTOP)"""
    gone: bool = False
    lanes: tuple[str, ...] = ()
    events: list[Event] = field(default_factory=list)
    reports: dict[str, Message] = field(default_factory=dict)
    notes: list[Message] = field(default_factory=list)


class RankStates:
    """The ranks of a session and what they say. `send` is the subclass's: how a rank is reached."""

    def __init__(self, world_size: int) -> None:
        self.ranks = [RankState() for _ in range(world_size)]
        self.changed = threading.Condition()
        self._texts: list[str] = []
        self._replies: dict[int, Message] = {}
        self._awaited, self._unwanted = set[int](), set[int]()
        """the numbers of replies: those that somebody waits for, and those to come for which nobody does"""
        self._ids = itertools.count(1)

    # -- to the ranks

    def send(self, rank: int, do: str, **fields: Any) -> int:
        """Command one rank; the id under which its reply will come."""
        raise NotImplementedError

    def begin(self, requests: dict[int, Message]) -> dict[int, int]:
        """Send one command to each of these ranks, together; what `finish` takes."""
        ids = {rank: self.send(rank, **message) for rank, message in requests.items()}
        with self.changed:
            self._awaited.update(ids.values())
        return ids

    def finish(
        self, ids: dict[int, int], timeout: float, check: Callable[[], None] = lambda: None
    ) -> dict[int, Message]:
        """The answers to what was begun.

        `check()` is called while waiting, and may raise. Raises TimeoutError, or RankRefused for a rank that refuses,
        though others may not have answered: they wait for it, perhaps.
        After a KeyboardInterrupt it may be called again: who does not must `forget`.
        """
        deadline, refused_at = time.monotonic() + timeout, float("inf")
        try:
            while not self._answered(ids) and time.monotonic() - refused_at < REFUSED_S:
                check()
                if any("error" in answer for answer in self._answers(ids).values()):
                    refused_at = min(refused_at, time.monotonic())
                elif time.monotonic() > deadline:
                    silent = ids.keys() - self._answers(ids).keys()
                    raise NoAnswer(
                        f"no answer from rank {', '.join(map(str, sorted(silent)))} within {timeout:g} s"
                    )
            answers = self._answers(ids)
        except KeyboardInterrupt:  # what has come so far does not come again
            raise
        except BaseException:
            self.forget(ids)
            raise
        self.forget(ids)
        for rank, answer in answers.items():
            if "error" in answer:
                text = answer["error"]
                raise RankRefused(text if text.startswith(f"rank {rank} ") else f"rank {rank}: {text}")
        return answers

    def collect(self, ids: dict[int, int]) -> dict[int, Message]:
        """The answers that have come to what was begun, without waiting; who has answered is taken out of `ids`."""
        with self.changed:
            come = {rank: number for rank, number in ids.items() if number in self._replies}
            self._awaited.difference_update(come.values())
            return {rank: self._replies.pop(ids.pop(rank)) for rank in come}

    def ask(
        self, requests: dict[int, Message], timeout: float, check: Callable[[], None] = lambda: None
    ) -> dict[int, Message]:
        """Send one command to each of these ranks, together; their answers. Raises as `finish` does."""
        begun = self.begin(requests)
        try:
            return self.finish(begun, timeout, check)
        finally:
            self.forget(begun)

    def forget(self, ids: dict[int, int]) -> None:
        """Nobody waits for these replies any more; those that are still to come are dropped."""
        with self.changed:
            for number in self._awaited.intersection(ids.values()):
                self._awaited.discard(number)
                if self._replies.pop(number, None) is None:
                    self._unwanted.add(number)

    # -- from the ranks

    def take(self, message: Message, events: Sequence[Event] = ()) -> None:
        """Keep what a rank has said, and which ops have ended since it spoke last."""
        rank = message["rank"]
        state = self.ranks[rank]
        with self.changed:
            state.heard = time.monotonic()
            state.events += events
            match message["type"]:
                case "state":
                    update(state, message)
                case "lanes":
                    state.lanes, state.events = tuple(message["lanes"]), []
                    state.reports.pop("error", None)
                case "reply":
                    if message["id"] in self._unwanted:
                        self._unwanted.discard(message["id"])
                    else:
                        self._replies[message["id"]] = message
                case "text":
                    self._texts.append(message["text"])
                case "note":
                    state.notes.append(message)
                case "ask":
                    self.send(rank, message["key"], stands=self._stands())
                case "gone":
                    state.gone = True
                case kind:
                    state.reports[kind] = message
            self.changed.notify_all()

    def new_texts(self) -> list[str]:
        """The pieces of generated text that have come since the last call."""
        with self.changed:
            texts, self._texts = self._texts, []
            return texts

    def new_notes(self) -> list[Message]:
        """What ranks have noted since the last call."""
        with self.changed:
            notes = [note for state in self.ranks for note in state.notes]
            for state in self.ranks:
                state.notes = []
            return notes

    def reset(self, rank: int) -> None:
        """Forget a rank, which comes anew."""
        with self.changed:
            self.ranks[rank] = RankState()
            self.changed.notify_all()

    def _stands(self) -> list[Message | None]:
        return [stand_fields(state.stand) if state.stand else None for state in self.ranks]

    def _answers(self, ids: dict[int, int]) -> dict[int, Message]:
        """Those that are there, by rank."""
        with self.changed:
            return {rank: self._replies[number] for rank, number in ids.items() if number in self._replies}

    def _answered(self, ids: dict[int, int]) -> bool:
        """Whether all these replies are there; waits a little for the next message if not."""
        with self.changed:
            return self.changed.wait_for(lambda: all(n in self._replies for n in ids.values()), ASK_S)


def update(state: RankState, message: Message) -> None:
    """Take over where a rank stands and how its process is."""
    stand = stand_of(message)
    if (stand, message["phase"], message["decoded"]) != (state.stand, state.phase, state.decoded):
        state.progressed = state.heard
    state.stand, state.phase, state.decoded = stand, message["phase"], message["decoded"]
    state.process, state.cpu_s = message["process"], message["cpu_s"]
    state.wants_cpu = message.get("wants_cpu", 0.0)
    state.memory = message.get("memory")
    on_device = message.get("device_memory")
    state.device_memory = on_device and DeviceMemory(*on_device)
    if state.process not in ("T", "t"):
        state.stopped = None
    elif state.stopped is None:
        state.stopped = state.heard


class Ranks(RankStates):
    """Those who started the ranks, or joined them, implement this."""

    can_kill = True
    """whether a rank can be ended and started again alone"""

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    def describe(self) -> str:
        """One line for people."""
        raise NotImplementedError

    def exits(self) -> list[int | None]:
        """By rank, an exit status where its process has ended."""
        raise NotImplementedError

    def cores(self) -> list[int]:
        """How many ranks share each rank's host."""
        raise NotImplementedError

    def meeting(self) -> Message:
        """Where the ranks' group is to meet: address and port."""
        raise NotImplementedError

    def silent(self) -> list[int]:
        """Ranks that do not answer though their process is there."""
        raise NotImplementedError

    def kill(self, rank: int) -> None:
        """End one rank's process."""
        raise NotImplementedError

    def revive(self, rank: int) -> None:
        """Start one rank again under its number."""
        raise NotImplementedError

    def listen_for_debugger(self, rank: int, port: int) -> tuple[str, int]:
        """Let a client of debugpy attach to one rank: on which host, at which port."""
        raise NotImplementedError

    def free(self) -> None:
        """Wake what is blocked in the transport, where that can be done from here."""

    def share_weights(self) -> None:
        """Let ranks of one process use one copy of the weights."""

    def close(self) -> None:
        """Part from the ranks."""
        raise NotImplementedError


class AskableRanks(Protocol):
    """What asking and watching needs of ranks: the session's `Ranks` have it, and a run's `RankLease`."""

    ranks: list[RankState]
    changed: threading.Condition

    def ask(
        self, requests: dict[int, Message], timeout: float, check: Callable[[], None] = ...
    ) -> dict[int, Message]:
        """See `RankStates.ask`."""

    def begin(self, requests: dict[int, Message]) -> dict[int, int]:
        """See `RankStates.begin`."""

    def finish(
        self, ids: dict[int, int], timeout: float, check: Callable[[], None] = ...
    ) -> dict[int, Message]:
        """See `RankStates.finish`."""

    def collect(self, ids: dict[int, int]) -> dict[int, Message]:
        """See `RankStates.collect`."""

    def forget(self, ids: dict[int, int]) -> None:
        """See `RankStates.forget`."""


LOST = 256
"""Stands for the exit status of a process of which only the end is known."""

ANSWER_S = 0.5


def answers(ranks: AskableRanks, requests: dict[int, Message], timeout: float) -> dict[int, Message]:
    """What those ranks say that answer in time and do not refuse; all are asked together."""
    begun = ranks.begin(requests)
    deadline = time.monotonic() + timeout
    found = dict[int, Message]()
    for rank, number in begun.items():
        with suppress(TimeoutError, RankRefused):
            found |= ranks.finish({rank: number}, max(0.0, deadline - time.monotonic()))
    return found

"""Timing: when each op of a plan would begin and end on a machine that is given as numbers. The only simulator of time.

An op begins when it is the next on its lane and what it needs is there. Once a send and its recv have both begun, their
message travels; the send ends with its last byte or, by the machine's buffers, a little before. Messages that travel at
the same time share what the links carry: the machine says how.
"""

from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

from dinfer.plan.graph import NONE, Channel, Graph, channel_of, gc_paused
from dinfer.plan.ops import Op, PlanError
from dinfer.plan.partition import Shape


class Timings(Protocol):
    """How long things take on a machine, in seconds."""

    def compute(self, rank: int, op: Op, shape: Shape) -> float:
        """Seconds of an op that is no transfer, on that rank."""

    def message(self, op: Op) -> int:
        """Bytes of a transfer's payload."""

    def coding(self, op: Op) -> tuple[float, float]:
        """Seconds in which a transfer's payload is encoded where it was computed, and decoded where it arrives, both
        beside compute."""

    def latency(self, channel: Channel) -> float:
        """Seconds from when both ranks have begun to the payload's first byte."""

    def ahead(self, channel: Channel) -> float:
        """Bytes of a message that are still on their way when its send ends: buffers of the system have them."""

    def rates(self, moving: Sequence[Channel]) -> Sequence[float]:
        """Bytes per second of each of these messages, if just these travel; 0 for one that waits for others."""


class OpTimes(NamedTuple):
    """As those of an event (`trace.events.Event`), in seconds."""

    ready: float
    start: float
    met: float
    end: float


class TimedRun(NamedTuple):
    """`times`: those of each op, by its number in the graph; `makespan`: when the last one ends, seconds."""

    times: list[OpTimes]
    makespan: float


@gc_paused()
def timed(graph: Graph, machine: Timings) -> TimedRun:
    """Run the plan in simulated time, with sends that wait for their recv. Raises PlanError for one that hangs so."""
    run = _Simulated(graph, machine)
    run.to_end()
    if len(run.ended) < len(graph.ops):
        raise PlanError("this plan can hang, so how long it takes is not known: verify says why.")
    return TimedRun(run.times(), run.now)


class _Simulated:
    """One simulation. `missing`: by op, how many it still waits for; `begun`, `met`: by op, once it has begun;
    `moving`: by send, the bytes that are still to arrive."""

    def __init__(self, graph: Graph, machine: Timings) -> None:
        self.graph, self.machine, self.now = graph, machine, 0.0
        deps = zip(graph.deps, graph.before, strict=True)
        self.missing = [len(needed) + (before != NONE) for needed, before in deps]
        self.begun: dict[int, float] = {}
        self.met: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self.moving: dict[int, float] = {}
        self._channels: dict[int, Channel] = {}
        """those of `moving`, in the same order"""
        self._ahead: dict[int, float] = {}
        """by send that has not ended: the bytes that may be left when it does"""
        self._due: list[tuple[float, int, Callable[[int], None]]] = []
        """what happens at a known time: an op of compute ends, the first byte of a message travels"""
        self._rates: dict[int, float] = {}

    def to_end(self) -> None:
        for number, missing in enumerate(self.missing):
            if not missing:
                self._begin(number)
        while self._due or self.moving:
            arrival = min(self._arrivals(), default=None)
            if arrival is None or (self._due and self._due[0][0] <= self.now + arrival[0]):
                at, number, happen = heappop(self._due)
                self._advance(at)
                happen(number)
            else:
                self._advance(self.now + arrival[0])
                self._arrived(arrival[1])

    def times(self) -> list[OpTimes]:
        before = self.graph.before
        return [
            OpTimes(
                0.0 if before[n] == NONE else self.ended[before[n]],
                self.begun[n],
                self.met[n],
                self.ended[n],
            )
            for n in range(len(self.graph.ops))
        ]

    def _arrivals(self) -> Iterator[tuple[float, int]]:
        """In how many seconds each message, or the end of its send, would come, if none joined or left; without those
        that stand still."""
        for number, left in self.moving.items():
            if left <= (ahead := self._ahead.get(number, 0.0)):
                yield 0.0, number
            elif rate := self._rates[number]:
                yield (left - ahead) / rate, number

    def _advance(self, to: float) -> None:
        for number in self.moving:
            self.moving[number] = max(0.0, self.moving[number] - (to - self.now) * self._rates[number])
        self.now = to

    def _begin(self, number: int) -> None:
        op, rank, peer = self.graph.ops[number], self.graph.ranks[number], self.graph.partner[number]
        self.begun[number] = self.now
        if not op.is_transfer:
            self.met[number] = self.now
            took = self.machine.compute(rank, op, self.graph.plan.shape)
            heappush(self._due, (self.now + took, number, self._end))
        elif peer in self.begun:
            sent = number if op.kind == "send" else peer
            self.met[number] = self.met[peer] = self.now
            latency = self.machine.latency(channel_of(rank, op))
            heappush(self._due, (self.now + self._encoding(sent) + latency, sent, self._leave))

    def _encoding(self, sent: int) -> float:
        """Seconds until what a send sends is encoded. That begins once it is computed; a rank that passes a block on
        has it encoded."""
        makers = [n for n in self.graph.deps[sent] if self.graph.ops[n].kind == "layer"]
        if not makers:
            return 0.0
        encode_s, _ = self.machine.coding(self.graph.ops[sent])
        return max(0.0, self.ended[makers[0]] + encode_s - self.now)

    def _leave(self, sent: int) -> None:
        self.moving[sent] = float(self.machine.message(self.graph.ops[sent]))
        channel = channel_of(self.graph.ranks[sent], self.graph.ops[sent])
        self._channels[sent], self._ahead[sent] = channel, self.machine.ahead(channel)
        self._share()

    def _arrived(self, sent: int) -> None:
        """The send ends, and the recv if that was the last byte."""
        if sent in self._ahead:
            self.moving[sent] = min(self.moving[sent], self._ahead.pop(sent))
            self._end(sent)
            if self.moving[sent]:
                return
        del self.moving[sent], self._channels[sent]
        self._share()
        received = self.graph.partner[sent]
        _, decode_s = self.machine.coding(self.graph.ops[received])
        if decode_s:
            heappush(self._due, (self.now + decode_s, received, self._end))
        else:
            self._end(received)

    def _share(self) -> None:
        """Give each message its part of the links."""
        if not self.moving:
            return
        rates = self.machine.rates(tuple(self._channels.values()))
        self._rates = dict(zip(self.moving, rates, strict=True))

    def _end(self, number: int) -> None:
        self.ended[number] = self.now
        for dependent in self.graph.dependents[number]:
            self.missing[dependent] -= 1
            if not self.missing[dependent]:
                self._begin(dependent)

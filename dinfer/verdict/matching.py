"""Which recorded ops belong together: a send and its recv, and what the ranks of a group do as one collective. Pure.

Messages are matched first in, first out for each group, source and destination, and by tag where the backend heeds it;
collectives by their number in the group. Who recorded may have numbered the ops, and dropped older ones, on each rank
others; what is not numbered is counted. Events without a call are of dinfer's own kind: their messages are matched by
what they carry, and their collectives by lane.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import NamedTuple

from dinfer.trace.events import COLLECTIVES, QUEUED, TAGGED, Event, Group

MESSAGES = frozenset({"send", "recv"})

MAKING = frozenset({"init_group", "new_group"})
"""all ranks of the world make a group together; that is no collective of a group, whose order it does not keep"""


class OpChannel(NamedTuple):
    """What ops are numbered in: the messages from one rank to another, or the collectives of a group. `kind` is empty
    for events without a call, whose `group` is a lane or what a message carries. `backend`: a group may have several,
    which know nothing of each other."""

    group: str
    source: int | None = None
    target: int | None = None
    tag: int = 0
    kind: str = ""
    backend: str = ""


Side = tuple[int, bool]
"""a rank, and whether it receives"""


@dataclass(frozen=True, slots=True, eq=False)
class RecordedOp:
    """An event, and its place: `number` in its channel, `order` among all ops of its rank."""

    event: Event
    channel: OpChannel | None
    number: int
    order: int

    @property
    def side(self) -> Side:
        return self.event.rank, self.event.kind == "recv"

    @property
    def is_open(self) -> bool:
        return not self.event.end

    @property
    def blocks(self) -> bool:
        """Whether it is open and its caller waits for it, or a device does."""
        call = self.event.call
        return self.is_open and (call is None or self.is_queued or not call.is_async or call.is_waited)

    @property
    def is_queued(self) -> bool:
        """Whether its call returned once it was in a device's queue."""
        return self.event.call is not None and self.event.call.backend in QUEUED


class MatchedOps:
    """All ops of a run by rank, channel and number."""

    def __init__(self, events: Iterable[Event], groups: Mapping[str, Group]) -> None:
        self.groups = groups
        self.by_rank: dict[int, list[RecordedOp]] = defaultdict(list)
        self._by_channel: dict[OpChannel, dict[Side, dict[int, RecordedOp]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        self._any_source: set[tuple[str, int]] = set()
        """groups and ranks that receive from whoever sends first: there is no telling what they have received"""
        self._highest: dict[tuple[OpChannel, Side], int] = {}
        for event in sorted(events, key=_in_order):
            self._add(event)
        self._dropped = {rank for rank, ops in self.by_rank.items() if _are_some_gone(ops)}

    def _add(self, event: Event) -> None:
        channel, mine = channel_of(event), self.by_rank[event.rank]
        if channel is None:
            if event.kind == "recv" and event.call and event.peer is None:
                self._any_source.add((event.call.group, event.rank))
            mine.append(RecordedOp(event, None, 0, len(mine)))
            return
        side = self._by_channel[channel][event.rank, event.kind == "recv"]
        known = event.call.number if event.call else None
        op = RecordedOp(event, channel, next(reversed(side), -1) + 1 if known is None else known, len(mine))
        mine.append(op)
        side[op.number] = op
        self._highest[channel, op.side] = max(op.number, self._highest.get((channel, op.side), 0))

    def ranks_of(self, op: RecordedOp) -> list[int]:
        """The ranks of the op's group, or all ranks with events where that is unknown."""
        call = op.event.call
        known = self.groups.get("" if op.event.kind in MAKING else call.group) if call else None
        return sorted(known.ranks if known else self.by_rank)

    def is_matchable(self, op: RecordedOp) -> bool:
        """Whether the other end of that message can be told."""
        call = op.event.call
        if call is None or op.channel is None:
            return call is None
        receiver = op.event.peer if op.event.kind == "send" else op.event.rank
        return (call.group, receiver) not in self._any_source

    def other_end(self, op: RecordedOp) -> RecordedOp | None:
        """Of a message, the op of the other rank, if that has been issued."""
        if op.channel is None or op.event.peer is None:
            return None
        return self._by_channel[op.channel][op.event.peer, op.event.kind == "send"].get(op.number)

    def joined(self, op: RecordedOp, rank: int) -> RecordedOp | None:
        """That rank's part in this collective, if it has been issued."""
        return self._by_channel[op.channel][rank, False].get(op.number) if op.channel else None

    def has_passed(self, op: RecordedOp, rank: int, *, receives: bool = False) -> bool:
        """Whether that rank's part in this op has ended, also where the record of it is gone."""
        if op.channel is None:
            return False
        part = self._by_channel[op.channel][rank, receives].get(op.number)
        return (
            bool(part.event.end) if part else op.number < self._highest.get((op.channel, (rank, receives)), 0)
        )

    def is_missing(self, op: RecordedOp, rank: int, *, receives: bool = False) -> bool:
        """Whether that rank has no part in this op, and none of which the record may be gone."""
        if op.channel is None:
            return False
        highest = self._highest.get((op.channel, (rank, receives)))
        return rank not in self._dropped if highest is None else op.number > highest

    def ended(self, op: RecordedOp, rank: int, *, receives: bool = False) -> int:
        """How many ops that rank has ended in the channel of this op."""
        if op.channel is None:
            return 0
        side = self._by_channel[op.channel][rank, receives]
        ended = sum(not one.is_open for one in side.values())
        if rank not in self._dropped:
            return ended
        # What is gone had ended. Where all is gone, it is what this rank's earlier ops have met.
        return self._highest[op.channel, (rank, receives)] + 1 - len(side) + ended if side else op.number

    def messages(self) -> Iterator[tuple[RecordedOp, RecordedOp]]:
        """The send and the recv of each message that both ranks have recorded."""
        for channel, sides in list(self._by_channel.items()):
            if channel.source is None or channel.target is None:
                continue
            sends, recvs = sides.get((channel.source, False), {}), sides.get((channel.target, True), {})
            for number, send in sends.items():
                if number in recvs and self.is_matchable(send):
                    yield send, recvs[number]

    def links(self) -> Iterator[tuple[list[RecordedOp], list[RecordedOp]]]:
        """The sends and the recvs of each link whose first message both ranks have recorded, in order without a gap."""
        for channel, sides in list(self._by_channel.items()):
            if channel.source is None or channel.target is None:
                continue
            sends, recvs = sides.get((channel.source, False), {}), sides.get((channel.target, True), {})
            if 0 in sends and 0 in recvs and self.is_matchable(sends[0]):
                yield [*_from_first(sends)], [*_from_first(recvs)]

    def collectives(self) -> Iterator[dict[int, RecordedOp]]:
        """The parts of each collective by rank, in the order of numbers."""
        for channel, sides in list(self._by_channel.items()):
            if channel.source is not None:
                continue
            for number in sorted({number for side in sides.values() for number in side}):
                yield {rank: side[number] for (rank, _), side in sides.items() if number in side}


def _from_first(side: Mapping[int, RecordedOp]) -> Iterator[RecordedOp]:
    return map(side.__getitem__, takewhile(side.__contains__, count()))


def _are_some_gone(ops: Sequence[RecordedOp]) -> bool:
    """Whether a rank has dropped older ops, by the numbers that ops have in their process."""
    return any(op.event.call for op in ops) and len(ops) <= max(op.event.index or 0 for op in ops)


def channel_of(event: Event) -> OpChannel | None:
    """None for ops that meet no other, and for a recv whose sender is unknown."""
    call = event.call
    if call and call.number is not None and call.number < 0:
        return None
    if event.kind in MESSAGES:
        if event.peer is None:
            return None
        source, target = (event.rank, event.peer) if event.kind == "send" else (event.peer, event.rank)
        if call is None:
            return OpChannel(event.what, source, target)
        tag = call.tag if call.backend in TAGGED else 0
        return OpChannel(call.group, source, target, tag, "message", call.backend)
    if event.kind in MAKING:
        return OpChannel("", kind=event.kind)
    if event.kind in COLLECTIVES:
        return (
            OpChannel(call.group, kind="collective", backend=call.backend) if call else OpChannel(event.lane)
        )
    return None


def _in_order(event: Event) -> tuple[bool, int, int]:
    """Calls in the order in which they were issued; of dinfer's own events an open one is its lane's last."""
    if event.call:
        return False, event.ready, event.index or 0
    return not event.end, 0, 0

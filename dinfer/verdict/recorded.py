"""Makes the graph of who waits for whom from events alone, without a plan: also for runs of other people's code.

An event whose `end` is 0 is open: its op has begun and not ended. Its chunk, layer and peer may be unknown. It may be a
collective: the n-th collective on a lane of one rank meets the n-th on the lane of that name of every other rank.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from math import inf

from dinfer.trace.events import COLLECTIVES, Event
from dinfer.verdict.judge import judge
from dinfer.verdict.planned import busy
from dinfer.verdict.signs import Signs
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.waits import STUCK_S, HangKind, Node, Root, Wait, Waits
from dinfer.verdict.where import ranks_text

NOBODY = Signs()


def explain_events(
    events: Iterable[Event], signs: Mapping[int, Signs] | None = None, now: int | None = None
) -> Verdict:
    """Why a run with these events, open ones among them, does not move.

    `signs`: by rank, what else is known; what they say of lanes is ignored. `now`: nanoseconds on the events' clock;
    None: the run has not moved since.
    """
    return judge(RecordedEvents(events, signs or {}, now).waits())


def event_text(event: Event) -> str:
    """The op, as far as it is known, for example `recv kv c0 l3 <- 1` or `all_reduce`."""
    if event.peer is None:
        return event.name
    return f"{event.name} {'<-' if event.kind == 'recv' else '->'} {event.peer}"


class RecordedEvents:
    """The events of a run up to one moment."""

    def __init__(self, events: Iterable[Event], signs: Mapping[int, Signs], now: int | None) -> None:
        self._signs, self._now = signs, now
        self._ended: dict[int, list[Event]] = defaultdict(list)
        self._open: dict[Node, Event] = {}
        self._last: dict[int, Event] = {}
        lanes: dict[int, list[str]] = defaultdict(list)
        for event in events:
            names = lanes[event.rank]
            if event.lane not in names:
                names.append(event.lane)
            if event.end:
                self._ended[event.rank].append(event)
                self._last[event.rank] = max(event, self._last.get(event.rank, event), key=lambda e: e.end)
            else:
                self._open[Node(event.rank, names.index(event.lane))] = event
        self._ranks = sorted({*lanes, *signs})

    def waits(self) -> Waits:
        found: Waits = {}
        for rank in self._ranks:
            mine = [node for node in self._open if node.rank == rank]
            root = self._broken_by(rank)
            if root or not mine:
                found[Node(rank)] = self._whole(rank, root)
            else:
                found |= {node: self._wait(node, self._open[node]) for node in mine}
        return found

    def _whole(self, rank: int, root: Root | None) -> Wait:
        text = (
            f"began nothing after `{event_text(self._last[rank])}`" if rank in self._last else "began nothing"
        )
        is_through = not self._open
        root = root or (Root("done", rank, text) if is_through else self._busy(rank, text, inf))
        return Wait(Node(rank), root.text, self._still(self._last.get(rank)), root=root)

    def _broken_by(self, rank: int) -> Root | None:
        """What is wrong with a rank as a whole."""
        signs = self._signs.get(rank, NOBODY)
        if signs.raised and not signs.raised.secondary:
            return Root("exception", rank, f"raised {signs.raised.message}")
        if signs.ended:
            return Root("dead", rank, signs.ended)
        if signs.is_stopped:
            return Root("stopped", rank, "is stopped by a signal or a debugger")
        return (
            Root("lost peer", rank, f"lost its connection: {signs.raised.message}") if signs.raised else None
        )

    def _wait(self, node: Node, event: Event) -> Wait:
        still = self._still(event)
        wait = Wait(node, f"is in `{event_text(event)}`", still, detail=_size(event), what=event_text(event))
        if event.kind in ("send", "recv") and event.peer is not None:
            return self._transfer(wait, event, event.peer)
        if event.kind in COLLECTIVES:
            return self._collective(wait, event)
        return wait._replace(root=self._busy(node.rank, wait.text, still), detail="")

    # -- transfers

    def _transfer(self, wait: Wait, event: Event, peer: int) -> Wait:
        rank, other = event.rank, "send" if event.kind == "recv" else "recv"
        if self._broken_by(peer):
            return wait._replace(on=(Node(peer),))
        mine = self._count(rank, event.kind, peer, event.what)
        theirs = self._count(peer, other, rank, event.what)
        if theirs > mine:
            kind: HangKind = "never sent" if event.kind == "recv" else "never received"
            verb = "sent" if event.kind == "recv" else "received"
            text = f"has ended {theirs} such {other}s, and not {verb} the one of `{event_text(event)}`"
            return wait._replace(root=self._ripe(wait, Root(kind, peer, text, rank)))
        met = next((e for e in self._open.values() if _is_other_end(e, event)), None)
        if met is None or theirs < mine:
            return wait._replace(on=tuple(self._nodes(peer, event.what)))
        if wrong := _difference(event, met):
            sender = rank if event.kind == "send" else peer
            return wait._replace(
                root=self._ripe(wait, Root(wrong[0], sender, wrong[1], peer + rank - sender))
            )
        source, target = (rank, peer) if event.kind == "send" else (peer, rank)
        text = f"the link {source}→{target} does not carry `{event_text(event)}`: both ends are there"
        return wait._replace(root=self._ripe(wait, Root("stalled link", source, text, target)))

    def _count(self, rank: int, kind: str, peer: int, what: str) -> int:
        return sum((e.kind, e.peer, e.what) == (kind, peer, what) for e in self._ended[rank])

    # -- collectives

    def _collective(self, wait: Wait, event: Event) -> Wait:
        """The wait of a rank in a collective: for all ranks that are not in the same one yet."""
        number = self._collectives(event.rank, event.lane)
        others = [rank for rank in self._ranks if rank != event.rank]
        behind = [
            rank for rank in others if self._broken_by(rank) or not self._has_come(rank, event.lane, number)
        ]
        if behind:
            text = f"{wait.text}, the collective {number} of lane {event.lane}, and waits for {ranks_text(behind)}"
            on = dict.fromkeys(node for rank in behind for node in self._nodes(rank, "", event.lane))
            return wait._replace(text=text, on=tuple(on))
        for rank in others:
            met = self._open_on(rank, event.lane)
            if met and self._collectives(rank, event.lane) == number and (wrong := _difference(event, met)):
                odd = self._odd_one(event.lane, number)
                return wait._replace(root=self._ripe(wait, Root(wrong[0], odd, wrong[1])))
        text = f"the link between all ranks does not carry `{event_text(event)}`: all are there"
        return wait._replace(root=self._ripe(wait, Root("stalled link", self._ranks[0], text)))

    def _collectives(self, rank: int, lane: str) -> int:
        """How many collectives of that lane have ended."""
        return sum(e.kind in COLLECTIVES and e.lane == lane for e in self._ended[rank])

    def _has_come(self, rank: int, lane: str, number: int) -> bool:
        ended = self._collectives(rank, lane)
        return ended > number or (ended == number and self._open_on(rank, lane) is not None)

    def _open_on(self, rank: int, lane: str) -> Event | None:
        found = (e for node, e in self._open.items() if node.rank == rank and e.lane == lane)
        return next((event for event in found if event.kind in COLLECTIVES), None)

    def _odd_one(self, lane: str, number: int) -> int:
        """Of the ranks in that collective of the lane, one whose kind and size the fewest others have."""
        there = {rank: e for rank in self._ranks if (e := self._open_on(rank, lane))}
        there = {rank: e for rank, e in there.items() if self._collectives(rank, lane) == number}
        kinds = [(e.kind, e.bytes) for e in there.values()]
        return min(there, key=lambda rank: (kinds.count((there[rank].kind, there[rank].bytes)), -rank))

    # -- ranks and times

    def _nodes(self, rank: int, what: str, lane: str = "") -> Iterator[Node]:
        """The nodes of a rank that may have to end before it begins something: lanes of that kind, else all."""
        mine = {} if self._broken_by(rank) else {n: e for n, e in self._open.items() if n.rank == rank}
        same = [n for n, e in mine.items() if (lane and e.lane == lane) or (what and e.what == what)]
        yield from same or mine or [Node(rank)]

    def _busy(self, rank: int, text: str, still: float) -> Root:
        signs = self._signs.get(rank, NOBODY)
        frame = next((frame for frame in signs.frames.values() if not frame.waits), None)
        if still < STUCK_S:
            return Root("moving", rank, text)
        return busy(rank, signs, text, still, 0.0, frame)

    def _ripe(self, wait: Wait, root: Root) -> Root:
        """The root; "moving" as long as what is missing may still be on its way."""
        return root if wait.still_s >= STUCK_S else root._replace(kind="moving")

    def _still(self, event: Event | None) -> float:
        if event is None or self._now is None:
            return inf
        return (self._now - max(event.ready, event.start, event.met, event.end)) / 1e9


def _is_other_end(one: Event, other: Event) -> bool:
    return (one.rank, one.peer, one.what, {one.kind, other.kind}) == (
        other.peer,
        other.rank,
        other.what,
        {"send", "recv"},
    )


def _difference(one: Event, other: Event) -> tuple[HangKind, str] | None:
    """How two events that meet do not fit, if they do not."""
    both = f"`{event_text(one)}` on rank {one.rank} meets `{event_text(other)}` on rank {other.rank}"
    if one.kind in COLLECTIVES and one.kind != other.kind:
        return "out of order", f"is in another collective: {both}"
    if any(
        None not in pair and pair[0] != pair[1]
        for pair in ((one.chunk, other.chunk), (one.layer, other.layer))
    ):
        return "out of order", f"is out of order: {both}"
    if one.bytes and other.bytes and one.bytes != other.bytes:
        return "other size", f"has another size: {both}, {one.bytes:,} and {other.bytes:,} bytes"
    return None


def _size(event: Event) -> str:
    return f"{event.bytes:,} bytes" if event.bytes else ""

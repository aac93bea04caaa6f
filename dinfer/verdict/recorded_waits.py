"""The graph of who waits for whom in a run of other people's code, made of its events alone, without a plan.

An event whose `end` is 0 is open: its op has begun and not ended. Its chunk, layer and peer may be unknown. It may be a
collective. `matching` says which ops belong together; `recorded` has the graph judged, and tells it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import inf

from dinfer.trace.events import COLLECTIVES, Event, Group
from dinfer.verdict.matching import MAKING, MESSAGES, MatchedOps, RecordedOp
from dinfer.verdict.op_text import (
    event_text,
    full_text,
    nth,
    size_text,
)
from dinfer.verdict.planned import busy
from dinfer.verdict.signs import Signs
from dinfer.verdict.waits import STUCK_S, HangKind, Node, Root, Wait, Waits
from dinfer.verdict.where import ranks_text, seconds_text

NOBODY = Signs()

UNREAD = "unread"
"""the phase of a rank whose record cannot be read: nobody knows what it does"""

STANDS: frozenset[HangKind] = frozenset({"stuck in Python", "stuck in C", "stuck", "idle"})
"""what a rank may do for good between its ops, as long as nobody waits for it"""

SLOWEST_BYTES_PER_S = 2e6
"""a message that both ends are at counts as stuck only once it has had the time that it takes at this rate"""


START_S = 30.0
"""A rank that has begun nothing may take so much longer: programs import and load before they meet."""


class RecordedEvents:
    """The events of a run up to one moment; `open`: those that block their rank."""

    def __init__(
        self,
        events: Iterable[Event],
        signs: Mapping[int, Signs],
        now: int | None,
        groups: Mapping[str, Group],
        stuck_s: float = STUCK_S,
    ) -> None:
        self.signs, self._now, self._stuck_s = signs, now, stuck_s
        self.ops = MatchedOps(events, groups)
        known = {rank for group in groups.values() for rank in group.ranks}
        self._ranks = sorted({*self.ops.by_rank, *signs, *known})
        self.open = {
            Node(rank, op.order): op
            for rank in self._ranks
            for op in self._still_open(self.ops.by_rank[rank], signs.get(rank, NOBODY))
        }

    @staticmethod
    def _still_open(ops: list[RecordedOp], signs: Signs) -> Iterator[RecordedOp]:
        """The ops of a rank that block it. Where C++ code has waited for one, as DDP's does, its end may be unknown: it
        was before its thread's next op, or the end of the program."""
        if signs.phase == "done":
            return
        last = {op.event.lane: op.order for op in ops}
        for op in ops:
            call = op.event.call
            is_past = call and not op.is_queued and not call.is_waited and op.order < last[op.event.lane]
            if op.blocks and not is_past:
                yield op

    def waits(self) -> Waits:
        found: Waits = {}
        for rank in self._ranks:
            root = self._broken_by(rank)
            if root or not self.mine(rank):
                found[Node(rank)] = self._whole(rank, root)
            else:
                found |= {node: self._wait(node, self.open[node]) for node in self.mine(rank)}
        return self._without_unmissed(found)

    @staticmethod
    def _without_unmissed(waits: Waits) -> Waits:
        """A rank that stands between ops and for which no other waits hangs nobody: it may serve, or sleep."""
        missed = {to.rank for wait in waits.values() for to in wait.on if to.rank != wait.node.rank}
        return {
            node: wait._replace(root=wait.root._replace(kind="moving"))
            if wait.root and node == Node(node.rank) and wait.root.kind in STANDS and node.rank not in missed
            else wait
            for node, wait in waits.items()
        }

    # -- ranks as a whole

    def mine(self, rank: int) -> list[Node]:
        return [node for node in self.open if node.rank == rank]

    def _last(self, rank: int) -> Event | None:
        ended = (op.event for op in self.ops.by_rank[rank] if op.event.end)
        return max(ended, key=lambda event: event.end, default=None)

    def _whole(self, rank: int, root: Root | None) -> Wait:
        last = self._last(rank)
        text = f"began nothing after {full_text(last)}" if last else "began nothing"
        if self.signs.get(rank, NOBODY).phase == "done":
            left = self.signs[rank].left
            text = f"{left}, after {full_text(last)}" if last else left
            root = root or Root("done", rank, text)
        is_through = not self.open
        still = self._still(last) if last or self._now is None else self._waited() - START_S
        if self.signs.get(rank, NOBODY).phase == UNREAD:
            text = "left a record that cannot be read"
            root = Root("stuck" if self._now is None else "moving", rank, text)
        root = root or (Root("done", rank, text) if is_through else self._busy(rank, text, still))
        return Wait(Node(rank), root.text if root.rank == rank else self._lost(rank), still, root=root)

    def _waited(self) -> float:
        """For how long others have waited for a rank that has begun nothing yet: programs may take long to start."""
        return max((self._still(op.event) for op in self.open.values()), default=0.0)

    def _broken_by(self, rank: int) -> Root | None:
        """What is wrong with a rank as a whole."""
        signs = self.signs.get(rank, NOBODY)
        at = "".join(f", in {full_text(self.open[node].event)}" for node in self.mine(rank)[:1])
        if signs.raised and not signs.raised.secondary and not signs.raised.handled:
            where = f" at {signs.raised.op}" if signs.raised.op else ""
            waits = f"; it now waits in its handler{at}" if at and not signs.ended else ""
            return Root("exception", rank, f"raised {signs.raised.message}{where}{waits}")
        if signs.ended or signs.is_stopped:
            last = self._last(rank)
            at = at or (last and f", after {full_text(last)}") or ""
        if signs.ended:
            return self._killed_by_other(rank) or Root("dead", rank, f"{signs.ended}{at}")
        if signs.is_stopped:
            return Root("stopped", rank, f"is stopped by a signal or a debugger{at}")
        if signs.raised and not signs.raised.handled:
            return self._left_by(rank) or Root("lost peer", rank, self._lost(rank))
        return None

    def _lost(self, rank: int) -> str:
        raised = self.signs[rank].raised
        return f"lost its connection: {raised.message if raised else ''}"

    def _left_by(self, rank: int) -> Root | None:
        """Of a rank that lost its connection: the rank that had ended by itself without its part in that op."""
        op = max(self.ops.by_rank[rank], key=lambda one: one.event.ready, default=None)
        if op is None:
            return None
        event = op.event
        others = [event.peer] if event.kind in MESSAGES else self.ops.ranks_of(op)
        for other in others:
            if other in (None, rank) or self.signs.get(other, NOBODY).phase != "done":
                continue
            if self.ops.is_missing(op, other, receives=event.kind == "send"):
                kind: HangKind = "never joined"
                if event.kind in MESSAGES:
                    kind = "never received" if event.kind == "send" else "never sent"
                text = self._absent(op, other, f"is in {full_text(event)}")
                return Root(kind, other, text, rank)
        return None

    def _killed_by_other(self, rank: int) -> Root | None:
        """Of a rank that died in an op, how what it met there differs: backends end a process for it."""
        for op in map(self.open.__getitem__, self.mine(rank)):
            if op.event.kind in MESSAGES:
                met = [self.ops.other_end(op)]
            else:
                met = [self.ops.joined(op, other) for other in self.ops.ranks_of(op) if other != rank]
            parts = [op, *filter(None, met)]
            for other in parts[1:]:
                if wrong := difference(op.event, other.event):
                    root = self._differs(op, other, parts, wrong)
                    return root._replace(text=f"{root.text}: this ended rank {rank}")
        return None

    def _nodes(self, rank: int, like: RecordedOp | None = None) -> Iterator[Node]:
        """What must end on a rank before it begins something: an op of that channel or group, else all that it waits
        for; where a device's queue is all that is known, the first in it; else the rank as a whole."""
        mine = [] if self._broken_by(rank) else self.mine(rank)
        if mine and all(self.open[node].is_queued for node in mine):
            mine = mine[:1]
        same = [node for node in mine if like and self._is_alike(self.open[node], like)]
        yield from same or mine or [Node(rank)]

    @staticmethod
    def _is_alike(one: RecordedOp, other: RecordedOp) -> bool:
        if other.event.call:
            return False  # which thread of other people's code will begin an op is unknown
        if other.event.kind in COLLECTIVES:
            return one.event.lane == other.event.lane
        return bool(one.event.what) and one.event.what == other.event.what

    # -- ops

    def _wait(self, node: Node, op: RecordedOp) -> Wait:
        event = op.event
        what = event_text(event)
        wait = Wait(node, f"is in {full_text(event)}", self._still(event), detail=size_text(event), what=what)
        if event.kind in MESSAGES:
            return self._transfer(wait, op)
        if op.channel is not None:
            return self._collective(wait, op)
        return wait._replace(root=self._busy(node.rank, wait.text, wait.still_s), detail="")

    def _transfer(self, wait: Wait, op: RecordedOp) -> Wait:
        event = op.event
        rank, peer = event.rank, event.peer
        if peer is None:
            return self._from_anyone(wait, op)
        if peer == rank and event.call:
            text = f"is in {full_text(event)}, which is itself: no other rank can answer"
            return wait._replace(root=Root("wrong peer", rank, text))
        if not self.ops.is_matchable(op):
            return wait._replace(on=tuple(self._nodes(peer, op)))
        met = self.ops.other_end(op)
        if self.ops.has_passed(op, peer, receives=event.kind == "send"):
            return self._passed_by(wait, op, met)
        if self._broken_by(peer):
            return wait._replace(on=(Node(peer),))
        if met is None:
            return self._unanswered(wait, op, peer)
        return self._met(wait, op, [op, met])

    def _from_anyone(self, wait: Wait, op: RecordedOp) -> Wait:
        """A recv from whoever sends first: it is stuck for good only if all others are."""
        others = [rank for rank in self.ops.ranks_of(op) if rank != op.event.rank]
        free = [rank for rank in others if not self.mine(rank) and not self._broken_by(rank)]
        on = dict.fromkeys(node for rank in free or others for node in self._nodes(rank, op))
        return wait._replace(on=tuple(on))

    def _unanswered(self, wait: Wait, op: RecordedOp, peer: int) -> Wait:
        """The other rank has not begun its end of this message."""
        event = op.event
        kind: HangKind = "never sent" if event.kind == "recv" else "never received"
        if self.mine(peer):
            text = wait.text
            if tagged := self._other_tag(op, peer):
                text += f", for which rank {peer} has another tag: {full_text(tagged)}"
            return wait._replace(text=text, on=tuple(self._nodes(peer, op)))
        signs = self.signs.get(peer)
        has_left = signs.phase == "done" if signs else bool(self.ops.by_rank[peer])
        if not event.call or not has_left:
            return wait._replace(on=(Node(peer),))
        text = self._absent(op, peer, wait.text)
        root = Root(kind, peer, text, event.rank)
        is_over = signs is not None and not signs.between_cells  # what has ended does no more
        return wait._replace(root=root if is_over else self._ripe(wait, root))

    def _absent(self, op: RecordedOp, other: int, waits: str) -> str:
        """What a rank that has left has not done for an op of another one, which `waits`."""
        event, last = op.event, self._last(other)
        signs = self.signs.get(other)
        left = (
            f"{signs.left if signs else 'has done nothing more'}{f' after {full_text(last)}' if last else ''}"
        )
        if event.kind not in MESSAGES:
            return f"{left} and takes no part in {full_text(event)} of rank {event.rank}"
        done = self.ops.ended(op, other, receives=event.kind == "send")
        verb, such = ("sent", "send") if event.kind == "recv" else ("received", "recv")
        some = f", with {done} such {such}{'s' * (done != 1)}," if done else ""
        return f"{left}{some} and not {verb} the {nth(op.number)}, for which rank {event.rank} {waits}"

    def _other_tag(self, op: RecordedOp, peer: int) -> Event | None:
        """What the other rank is in that would be the other end but for its tag."""
        call = op.event.call
        for node in self.mine(peer):
            other = self.open[node].event
            is_end = {other.kind, op.event.kind} == MESSAGES and other.peer == op.event.rank
            if is_end and call and other.call and other.call.group == call.group:
                return other if other.call.tag != call.tag else None
        return None

    def _passed_by(self, wait: Wait, op: RecordedOp, met: RecordedOp | None) -> Wait:
        """The other rank has ended its end of this message."""
        event = op.event
        rank, peer = event.rank, event.peer
        assert peer is not None
        if op.is_queued:
            return self._behind_device(wait, op, [peer])
        mine = self.ops.ended(op, rank, receives=event.kind == "recv")
        theirs = self.ops.ended(op, peer, receives=event.kind == "send")
        other = "send" if event.kind == "recv" else "recv"
        if not event.call:
            kind: HangKind = "never sent" if event.kind == "recv" else "never received"
            verb = "sent" if event.kind == "recv" else "received"
            text = f"has ended {theirs} such {other}s, and not {verb} the one of `{event_text(event)}`"
            return wait._replace(root=self._ripe(wait, Root(kind, peer, text, rank)))
        source, target = (rank, peer) if event.kind == "send" else (peer, rank)
        there = f": {full_text(met.event)} has ended on rank {peer}" if met else ""
        text = f"the link {source}→{target} has not carried {full_text(event)} after {mine} others{there}"
        return wait._replace(root=self._ripe(wait, Root("stalled link", source, text, target)))

    def _met(self, wait: Wait, op: RecordedOp, parts: list[RecordedOp]) -> Wait:
        """All ranks are at this op, and none has ended it."""
        event = op.event
        wait = wait._replace(
            still_s=min(self._still(part.event) for part in parts)
        )  # since the last of them came
        if op.is_queued and (earlier := self._earlier(parts)):
            return wait._replace(on=earlier)
        others = [part for part in parts if part is not op]
        for other in others:
            if wrong := difference(event, other.event):
                return wait._replace(root=self._ripe(wait, self._differs(op, other, parts, wrong)))
        if event.kind in MESSAGES and (dropped := self._dropped(parts)):
            return wait._replace(root=self._carried(wait, event, dropped))
        if event.kind in MESSAGES:
            assert event.peer is not None
            source, target = (event.rank, event.peer) if event.kind == "send" else (event.peer, event.rank)
            text = f"the link {source}→{target} does not carry {full_text(event)}: both ends are there"
            return wait._replace(root=self._carried(wait, event, Root("stalled link", source, text, target)))
        first = min(part.event.rank for part in parts)
        text = f"the link between all ranks does not carry {full_text(event)}: all are there"
        return wait._replace(root=self._carried(wait, event, Root("stalled link", first, text)))

    def _dropped(self, parts: list[RecordedOp]) -> Root | None:
        """The end of a message that nobody waits for: backends give up an op whose handle has been dropped."""
        for part in parts:
            call = part.event.call
            if call and call.is_async and not (call.is_waited or call.is_followed):
                other = next(op.event for op in parts if op is not part)
                is_send = part.event.kind == "send"
                text = (
                    f"began {full_text(part.event)} and does not wait for it, which gives it up once its handle is "
                    f"dropped; rank {other.rank} is in {full_text(other)}"
                )
                kind: HangKind = "never sent" if is_send else "never received"
                return Root(kind, part.event.rank, text, other.rank)
        return None

    def _differs(
        self, op: RecordedOp, other: RecordedOp, parts: list[RecordedOp], wrong: tuple[HangKind, str]
    ) -> Root:
        if op.event.kind in MESSAGES:
            sender, receiver = (op, other) if op.event.kind == "send" else (other, op)
            return Root(wrong[0], sender.event.rank, wrong[1], receiver.event.rank)
        kinds = Counter((part.event.kind, part.event.bytes) for part in parts)
        odd = min(parts, key=lambda part: (kinds[part.event.kind, part.event.bytes], -part.event.rank))
        rest = next(
            part for part in parts if difference(odd.event, part.event)
        )  # it differs from one of them at least
        _, text = difference(odd.event, rest.event) or wrong
        return Root(wrong[0], odd.event.rank, text)

    def _earlier(self, parts: list[RecordedOp]) -> tuple[Node, ...]:
        """Of the ranks at an op, what stands before it in their devices' queues."""
        found = []
        for part in parts:
            first = next(iter(self.mine(part.event.rank)), None)
            if first is not None and first.lane < part.order:
                found.append(first)
        return tuple(found)

    def _behind_device(self, wait: Wait, op: RecordedOp, others: list[int]) -> Wait:
        """Others have ended an op that is still in this rank's queue."""
        if earlier := self._earlier([op]):
            return wait._replace(on=earlier)
        ended = "has" if len(others) == 1 else "have"
        text = (
            f"{wait.text}, which {ranks_text(others)} {ended} ended, and not this rank: its device or its process "
            "stands still"
        )
        return wait._replace(root=self._ripe(wait, Root("stuck", op.event.rank, text)))

    # -- collectives

    def _collective(self, wait: Wait, op: RecordedOp) -> Wait:
        """The wait of a rank in a collective: for all ranks that are not in the same one yet."""
        event = op.event
        others = [rank for rank in self.ops.ranks_of(op) if rank != event.rank]
        passed = [rank for rank in others if self.ops.has_passed(op, rank)]
        if passed and op.is_queued:
            return self._behind_device(wait, op, passed)
        behind = [
            rank
            for rank in others
            if rank not in passed and (self._broken_by(rank) or self.ops.joined(op, rank) is None)
        ]
        if not behind:
            parts = [op, *filter(None, (self.ops.joined(op, rank) for rank in others))]
            return self._met(wait, op, parts)
        where = f"group {event.call.group}" if event.call else f"lane {event.lane}"
        which = f", the {nth(op.number)} of {where}," if event.kind not in MAKING else ""
        text = f"{wait.text}{which} and waits for {ranks_text(behind)}"
        gone = [rank for rank in behind if self._has_left(rank)]
        if gone and event.call:
            signs = self.signs.get(gone[0], NOBODY)
            said = self._absent(op, gone[0], wait.text)
            root = Root("never joined", gone[0], said, event.rank)
            return wait._replace(text=text, root=self._ripe(wait, root) if signs.between_cells else root)
        on = dict.fromkeys(node for rank in behind for node in self._nodes(rank, op))
        return wait._replace(text=text, on=tuple(on))

    def _has_left(self, rank: int) -> bool:
        return self.signs.get(rank, NOBODY).phase == "done" and not self._broken_by(rank)

    # -- times

    def _busy(self, rank: int, text: str, still: float) -> Root:
        signs = self.signs.get(rank, NOBODY)
        frame = next((frame for frame in signs.frames.values() if not frame.waits), None)
        if still < self._stuck_s:
            return Root("moving", rank, text)
        if rank not in self.signs:
            return Root("stuck", rank, f"{text}, and nothing more is known of it")
        at = f", at {frame}" if frame else ""
        does_nothing = not signs.cpu_moves and signs.answers is not False
        if signs.outside and does_nothing:
            return Root("idle", rank, f"{text} and waits for {signs.outside}{at}")
        if signs.child and does_nothing:
            since = seconds_text(still)
            return Root("stuck in Python", rank, f"{text} and waits for {signs.child} ({since}){at}")
        return busy(rank, signs, text, still, 0.0, frame)

    def _ripe(self, wait: Wait, root: Root) -> Root:
        """The root; "moving" as long as what is missing may still be on its way."""
        return root if wait.still_s >= self._stuck_s else root._replace(kind="moving")

    def _carried(self, wait: Wait, event: Event, root: Root) -> Root:
        """As `_ripe`, for what needs its time on the wire."""
        ripe = self._stuck_s + event.bytes / SLOWEST_BYTES_PER_S
        if event.kind in MAKING:
            ripe += START_S  # ranks connect to one another meanwhile, which takes long where there are many
        return root if wait.still_s >= ripe else root._replace(kind="moving")

    def _still(self, event: Event | None) -> float:
        if event is None or self._now is None:
            return inf
        return (self._now - max(event.ready, event.start, event.met, event.end)) / 1e9


SAME_BYTES = frozenset(
    {"send", "recv", "all_reduce", "broadcast", "all_gather", "reduce_scatter", "reduce", "other"}
)
"""kinds in which all ranks give or take as many bytes"""


def difference(one: Event, other: Event) -> tuple[HangKind, str] | None:
    """How two events that meet do not fit, if they do not."""
    both = f"{full_text(one)} on rank {one.rank} meets {full_text(other)} on rank {other.rank}"
    if one.kind not in MESSAGES and one.kind != other.kind:
        return "out of order", f"is in another collective: {both}"
    own = one.call is None and other.call is None
    if own and any(
        None not in pair and pair[0] != pair[1]
        for pair in ((one.chunk, other.chunk), (one.layer, other.layer))
    ):
        return "out of order", f"is out of order: {both}"
    if one.bytes and other.bytes and one.bytes != other.bytes and (own or one.kind in SAME_BYTES):
        return "other size", f"has another size: {both}, {one.bytes:,} and {other.bytes:,} bytes"
    types = {call.dtype for call in (one.call, other.call) if call and call.dtype}
    if len(types) > 1 and one.kind in SAME_BYTES:
        return "other size", f"has another dtype: {both}"
    return None

"""Makes the graph of who waits for whom from a plan and the ranks' signs of life. `judge` judges it."""

from collections.abc import Iterator, Sequence
from statistics import median

from dinfer.plan.graph import NONE, Graph, channel_of
from dinfer.plan.ops import Op
from dinfer.plan.plan import OpPlace, Plan
from dinfer.verdict.headers import has_passed, mismatch, who_lacks
from dinfer.verdict.signs import BUSY, KvBytes, Signs, StackFrame
from dinfer.verdict.waits import RANK, Node, Root, Wait, Waits, stuck_after
from dinfer.verdict.words import link_text, times_text, value_text, waits_for_text

ALIVE = ("prefill", "decode", "done")
"""phases in which a rank has its plan"""


class RankSigns:
    """What the signs of life say of each rank by itself: where its lanes stand, how long its ops take, what it does."""

    def __init__(self, plan: Plan, signs: Sequence[Signs], graph: Graph, ahead_s: float = 0.0) -> None:
        self.plan, self.graph, self.ahead_s = plan, graph, ahead_s
        self.signs = dict(enumerate(signs))

    def has_lanes(self, rank: int) -> bool:
        """Whether its lanes' positions are known."""
        signs, lanes = self.signs[rank], self.plan.lanes[rank]
        return signs.phase in ALIVE and len(signs.positions) == len(lanes)

    def busy(self, rank: int, text: str, still: float, typical: float, frame: StackFrame | None) -> Root:
        """The root for something that should end by itself."""
        if not self.is_ripe(still, typical):
            return Root("moving", rank, f"{text}, at {frame}" if frame else text)
        return busy(rank, self.signs[rank], text, still, typical, frame)

    def is_ripe(self, still: float, typical: float) -> bool:
        """Whether something that has not moved for so long counts as stuck, unless it uses CPU time."""
        return still + self.ahead_s >= stuck_after(typical)

    def main_op(self, rank: int) -> Op | None:
        """The op by which to name a rank: the one that it computes, else the first that it is in, else the next one."""
        signs = self.signs[rank]
        if not self.has_lanes(rank):
            return None
        lanes = zip(self.plan.lanes[rank], signs.positions, signs.started, strict=True)
        heads = [(lane.ops[at], started) for lane, at, started in lanes if at < len(lane.ops)]
        heads.sort(key=lambda head: (not head[1], head[0].is_transfer, head[0].what == "kv"))
        return heads[0][0] if heads else None

    def holder(self, rank: int) -> Node | None:
        """The lane whose thread keeps the rank's Python from answering; if that is unknown, the one that computes."""
        signs = self.signs[rank]
        for number, lane in enumerate(self.plan.lanes[rank]):
            if (
                lane.name == signs.holder
                and signs.started[number]
                and signs.positions[number] < len(lane.ops)
            ):
                return Node(rank, number)
        return self.computing(rank)

    def computing(self, rank: int) -> Node | None:
        """The lane of the rank that is in an op other than a transfer."""
        signs = self.signs[rank]
        for number, lane in enumerate(self.plan.lanes[rank]):
            at = signs.positions[number]
            if signs.started[number] and at < len(lane.ops) and not lane.ops[at].is_transfer:
                return Node(rank, number)
        return None

    def median(self, rank: int, op: Op) -> float:
        """How long such an op takes on that rank; if it has done none, on the others."""
        if own := self.signs[rank].medians.get(op.kind):
            return own
        return median([found for its in self.signs.values() if (found := its.medians.get(op.kind))] or [0.0])

    def frame(self, node: Node) -> StackFrame | None:
        """Where the lane's thread stands; of a rank that does not answer, only the busy thread is known."""
        signs, lane = self.signs[node.rank], self.plan.lanes[node.rank][node.lane]
        if signs.answers is False and node == self.holder(node.rank):
            return signs.frames.get(BUSY)
        return signs.frames.get(lane.name)

    def is_past(self, rank: int) -> bool:
        """Whether all its lanes have ended."""
        signs = self.signs[rank]
        lanes = zip(signs.positions, self.plan.lanes[rank], strict=True)
        return all(at == len(lane.ops) for at, lane in lanes)

    def number(self, node: Node) -> int:
        """The graph's number of the op at which the lane stands."""
        first = self.graph.first[self.graph.first_lane[node.rank] + node.lane]
        return first + self.signs[node.rank].positions[node.lane]

    def is_done(self, number: int) -> bool:
        place = self.graph.place(number)
        return has_passed(self.signs[place.rank], place)

    def is_at(self, place: OpPlace) -> bool:
        """Whether the op at this place has begun and not ended."""
        signs = self.signs[place.rank]
        return signs.positions[place.lane] == place.index and signs.started[place.lane]

    def still(self, place: OpPlace) -> float:
        """Seconds since that lane has moved."""
        signs = self.signs[place.rank]
        return signs.still_s[place.lane] if signs.still_s else signs.quiet_s


def busy(rank: int, signs: Signs, text: str, still: float, typical: float, frame: StackFrame | None) -> Root:
    """The root for something that should end by itself, and has taken too long."""
    since = times_text(still, typical)
    at = f", in {frame.c}" if frame and frame.c else ""
    at += f", at {frame}" if frame else ""
    if frame and frame.held:
        return Root("held", rank, f"{text} and stands at a debugger's breakpoint{at}")
    if signs.cpu_moves or (signs.cpu_moves is None and signs.process == "R"):
        return Root("computing", rank, f"{text} and still computing ({since}){at}")
    if signs.answers is False:
        held = "in C code that holds the interpreter (the GIL)"
        at = at or "; no stack of it could be read"
        return Root("stuck in C", rank, f"{text} and stuck {held} ({since}){at}")
    if frame is None:
        return Root("stuck", rank, f"{text} and stuck at an unknown line: no stack of it came ({since})")
    where = "C" if frame.native else "Python"
    return Root(
        "stuck in C" if frame.native else "stuck in Python",
        rank,
        f"{text} and stuck in {where} ({since}){at}",
    )


class Planned:
    """A `Wait` for every lane that has not ended, and for every rank as a whole that has none."""

    def __init__(self, ranks: RankSigns, sizes: KvBytes) -> None:
        self.ranks, self.plan, self.graph, self.signs = ranks, ranks.plan, ranks.graph, ranks.signs
        self.sizes = sizes
        self._broken = {rank: root for rank in self.signs if (root := self._broken_by(rank))}

    def waits(self) -> Waits:
        found: Waits = {}
        for rank in self.signs:
            for wait in self._of_rank(rank):
                found[wait.node] = wait
        return found

    # -- ranks as a whole

    def _of_rank(self, rank: int) -> Iterator[Wait]:
        signs = self.signs[rank]
        if root := self._broken.get(rank):
            op = self.ranks.main_op(rank)
            yield Wait(Node(rank), root.text, signs.quiet_s, root=root, op=op)
        elif not self.ranks.has_lanes(rank):
            yield self._without_lanes(rank)
        else:
            lanes = self.plan.lanes[rank]
            left = [n for n, lane in enumerate(lanes) if signs.positions[n] < len(lane.ops)]
            yield from (self._of_lane(rank, lane) for lane in left)
            if not left:
                yield self._past_lanes(rank)

    def _broken_by(self, rank: int) -> Root | None:
        """What is wrong with a rank as a whole."""
        signs = self.signs[rank]
        stood = f" in `{op}`" if (op := self.ranks.main_op(rank)) else f" ({signs.phase})"
        if signs.raised and not signs.raised.secondary:
            if signs.raised.came and signs.raised.op:
                return mismatch(self.graph, self.signs, rank, signs.raised)
            return Root("exception", rank, _raised_text(signs))
        if signs.ended:
            return Root("dead", rank, f"{signs.ended}; it stood{stood}")
        if signs.is_stopped:
            return Root("stopped", rank, f"is stopped by a signal or a debugger{stood}")
        if signs.plan_id is not None and signs.plan_id != self.plan.id:
            ids = f"id {signs.plan_id:016x}, the others' is {self.plan.id:016x}"
            return Root("another plan", rank, f"runs another plan ({ids})")
        if signs.raised:
            return Root("lost peer", rank, f"lost its connection: {signs.raised.message}")
        return None

    def _without_lanes(self, rank: int) -> Wait:
        signs = self.signs[rank]
        text = f"is {signs.phase}"
        root = self.ranks.busy(rank, text, signs.quiet_s, 0.0, next(iter(signs.frames.values()), None))
        return Wait(Node(rank), text, signs.quiet_s, root=root)

    def _past_lanes(self, rank: int) -> Wait:
        """The wait of a rank that has ended prefill. In decode, every rank compares each token with all others."""
        signs = self.signs[rank]
        if signs.phase == "prefill" and any(its.phase == "decode" for its in self.signs.values()):
            text, frame = "has not begun to decode", signs.frames.get("decode")
            root = self.ranks.busy(rank, text, signs.quiet_s, 0.0, frame)
            return Wait(Node(rank), text, signs.quiet_s, root=root)
        if signs.phase != "decode":
            return Wait(Node(rank), "has done all its ops", signs.quiet_s, root=Root("done", rank, "is done"))
        behind = [
            other
            for other, its in self.signs.items()
            if _token(its) < _token(signs) + (other in self._broken and other != rank)
        ]
        frame = signs.frames.get("decode") or signs.frames.get(BUSY)
        if not behind and frame and frame.waits:
            behind = [o for o, its in self.signs.items() if o != rank and not _waits(its)]
        if behind:
            text = f"waits for token {signs.decoded} of {', '.join(f'rank {other}' for other in behind)}"
            on = tuple(self._node(other) for other in behind)
            return Wait(Node(rank), text, signs.quiet_s, on, what=f"token {signs.decoded}")
        text = f"computes token {signs.decoded}"
        root = self.ranks.busy(rank, text, signs.quiet_s, signs.medians.get("decode", 0.0), frame)
        return Wait(Node(rank), text, signs.quiet_s, root=root)

    # -- lanes

    def _of_lane(self, rank: int, lane: int) -> Wait:
        signs = self.signs[rank]
        op = self.plan.lanes[rank][lane].ops[signs.positions[lane]]
        still = signs.still_s[lane] if signs.still_s else signs.quiet_s
        node = Node(rank, lane)
        if signs.answers is False and signs.started[lane]:
            return self._no_answer(node, op, still)
        if not signs.started[lane]:
            return self._unstarted(node, op, still)
        if op.is_transfer:
            return self._transfer(node, op, still)
        text = f"is in `{op}`"
        root = self.ranks.busy(rank, text, still, self.ranks.median(rank, op), self.ranks.frame(node))
        return Wait(node, text, still, root=root, op=op)

    def _no_answer(self, node: Node, op: Op, still: float) -> Wait:
        """The wait of a lane of a rank that does not answer: a transfer may have ended without its thread noticing."""
        text = f"is in `{op}`, and its Python does not answer"
        holder = self.ranks.holder(node.rank)
        if holder is not None and holder != node:
            return Wait(node, text, still, (holder,), op=op, what="its own Python")
        signs = self.signs[node.rank]
        is_one = signs.holder or sum(signs.started) == 1
        text = f"is in `{op}`" + ("" if is_one else ", or another of its ops,")
        frame = self.ranks.frame(node)
        root = self.ranks.busy(node.rank, text, still, self.ranks.median(node.rank, op), frame)
        return Wait(node, text, still, root=root, op=op)

    def _unstarted(self, node: Node, op: Op, still: float) -> Wait:
        signs = self.signs[node.rank]
        if signs.positions[node.lane] >= signs.limits[node.lane]:
            text = f"stands before `{op}`, where it was told to stop"
            return Wait(node, text, still, root=Root("held", node.rank, text), op=op)
        number = self.ranks.number(node)
        needs = dict(zip(op.needs(), self.graph.deps[number], strict=True))
        unmet = {n: maker for n, maker in needs.items() if maker == NONE or not self.ranks.is_done(maker)}
        holder = self.ranks.holder(node.rank) if signs.answers is False else None
        if not unmet and holder is not None:
            text = f"could begin `{op}`, and its Python does not answer"
            return Wait(node, text, still, (holder,), op=op, what="its own Python")
        if not unmet:
            text = f"could begin `{op}`"
            root = self.ranks.busy(node.rank, text, still, 0.0, self.ranks.frame(node))
            return Wait(node, text, still, root=root, op=op)
        need, maker = min(unmet.items(), key=lambda item: item[1] != NONE)
        text = f"cannot begin `{op}` before {need} is here"
        if maker == NONE:
            root = Root("never sent", node.rank, f"{text}, which nothing makes", None)
            return Wait(node, text, still, root=root, op=op)
        places = (self.graph.place(maker) for maker in unmet.values())
        on = dict.fromkeys(Node(place.rank, place.lane) for place in places)
        return Wait(node, text, still, tuple(on), op=op, what=str(need))

    def _transfer(self, node: Node, op: Op, still: float) -> Wait:
        text, what = waits_for_text(op), value_text(op)
        detail = link_text(node.rank, op, self.sizes)
        wait = Wait(node, text, still, op=op, detail=detail, what=what)
        partner = self.graph.partner[self.ranks.number(node)]
        if partner == NONE:
            lacks = f"sends {what} to rank {op.peer}, which nowhere receives it"
            if op.kind == "recv":
                lacks = f"waits for {what}, which rank {op.peer} nowhere sends"
            kind = "never received" if op.kind == "send" else "never sent"
            return wait._replace(root=Root(kind, node.rank, lacks, op.peer))  # type: ignore[arg-type]
        place = self.graph.place(partner)
        if has_passed(self.signs[op.peer], place):
            return self._passed_by(wait, place)
        other = self._node(op.peer, place.lane)
        if other.lane == RANK or not self.ranks.is_at(place):
            return wait._replace(on=(other,))
        return self._met(wait, place)

    def _passed_by(self, wait: Wait, place: OpPlace) -> Wait:
        """A transfer has ended on the other rank, and not here. That counts from the newer news of the two ranks, since
        those of one may be older."""
        assert wait.op
        peer, other = place.rank, self.plan.op(place)
        still = min(wait.still_s, self.ranks.still(place))
        if not self.ranks.is_ripe(still, self.ranks.median(wait.node.rank, wait.op)):
            return wait._replace(root=Root("moving", peer, f"has just ended `{other}`"))
        if peer in self._broken:
            return wait._replace(on=(Node(peer),))
        if wait.op.kind == "send" and (place.lane, place.index) in self.signs[peer].full:
            return wait._replace(root=self._again(wait.node.rank, wait.op, wait.what))
        if wait.op.kind == "send":
            text = f"has passed `{other}` and not received it"
            return wait._replace(root=Root("never received", peer, text, wait.node.rank))
        if stalled := next(self._stalled(wait.node.rank, peer), None):
            return wait._replace(on=(stalled,))
        if (got := self._who_got(peer, wait.op)) is not None:
            text = f"sent {wait.what} to rank {got} in place of rank {wait.node.rank}"
            return wait._replace(root=Root("wrong peer", peer, text, wait.node.rank))
        return wait._replace(
            root=Root("never sent", peer, f"has passed `{other}` and not sent it", wait.node.rank)
        )

    def _who_got(self, rank: int, op: Op) -> int | None:
        """Another rank to which `rank` is sending the value of this op, and which has it already."""
        for number, lane in enumerate(self.plan.lanes[rank]):
            at, signs = self.signs[rank].positions[number], self.signs[rank]
            if at < len(lane.ops) and signs.started[number]:
                other = lane.ops[at]
                partner = self.graph.partner[self.ranks.number(Node(rank, number))]
                if (other.kind, other.value) == ("send", op.value) and partner != NONE:
                    place = self.graph.place(partner)
                    if (place.lane, place.index) in self.signs[other.peer].full:
                        return other.peer
        return None

    def _again(self, rank: int, op: Op, what: str) -> Root:
        """The root of a send that the peer does not receive, since it has the value already."""
        robbed = who_lacks(self.graph, self.signs, channel_of(rank, op), op.value)
        if robbed is not None:
            return Root(
                "wrong peer", rank, f"sent {what} to rank {op.peer} in place of rank {robbed}", robbed
            )
        return Root("sent twice", rank, f"sends {what} once more, though rank {op.peer} has it", op.peer)

    def _stalled(self, rank: int, peer: int) -> Iterator[Node]:
        """Lanes of `rank` in another transfer with that peer that has begun on both."""
        signs = self.signs[rank]
        for number, lane in enumerate(self.plan.lanes[rank]):
            if signs.positions[number] < len(lane.ops) and signs.started[number]:
                partner = self.graph.partner[self.ranks.number(Node(rank, number))]
                if lane.ops[signs.positions[number]].peer == peer and partner != NONE:
                    yield from [Node(rank, number)] * self.ranks.is_at(self.graph.place(partner))

    def _met(self, wait: Wait, place: OpPlace) -> Wait:
        """Both ranks are in the transfer: one of them cannot take part, or the link between them is at fault."""
        assert wait.op
        node, op = wait.node, wait.op
        still = min(wait.still_s, self.ranks.still(place))
        typical = self.ranks.median(node.rank, op)
        for end in (node, Node(place.rank, place.lane)):
            signs, frame = self.signs[end.rank], self.ranks.frame(end)
            if signs.answers is False or (frame is not None and not frame.waits):
                holder = self.ranks.holder(end.rank)
                if holder is not None and signs.answers is False:
                    return wait._replace(on=(holder,))
                at = f"is in `{op if end == node else self.plan.op(place)}`"
                root = self.ranks.busy(end.rank, at, still, typical, frame)
                return wait._replace(root=root)
        wait = wait._replace(
            still_s=still
        )  # how long both are there: one may have waited for the other before
        source, target = (node.rank, op.peer) if op.kind == "send" else (op.peer, node.rank)
        both = f"the link {source}→{target} has been carrying {wait.what} for {times_text(still, typical)}"
        if not self.ranks.is_ripe(still, typical):
            return wait._replace(root=Root("moving", source, both, target))
        moves = [rank for rank in (source, target) if self.signs[rank].cpu_moves]
        if any(self.ranks.computing(rank) for rank in moves):  # then CPU time says nothing about the link
            return wait._replace(root=Root("moving", source, both, target))
        if moves:
            return wait._replace(root=Root("slow link", source, f"{both}, and CPU time moves", target))
        return wait._replace(root=Root("stalled link", source, f"{both}: both ends are there", target))

    def _node(self, rank: int, lane: int = RANK) -> Node:
        """The node of a lane, or of its rank if that is judged as a whole."""
        whole = rank in self._broken or not self.ranks.has_lanes(rank) or self.ranks.is_past(rank)
        return Node(rank) if whole or lane == RANK else Node(rank, lane)


def _token(signs: Signs) -> int:
    """How many tokens it has decoded; -1 before decode, a large number after it."""
    return signs.decoded if signs.phase == "decode" else -1 if signs.phase != "done" else 1 << 30


def _waits(signs: Signs) -> bool:
    frame = signs.frames.get("decode")
    return frame is not None and frame.waits


def _raised_text(signs: Signs) -> str:
    assert signs.raised
    raised = signs.raised
    at = f" at `{raised.op}`" if raised.op else ""
    handler = "" if signs.ended else " and now waits in its own handler"
    return f"raised {raised.message}{at}{handler}"

"""Makes the graph of who waits for whom from a plan and the ranks' signs of life. `judge` judges it."""

from collections.abc import Iterator, Sequence
from itertools import chain
from statistics import median

from dinfer.plan.graph import NONE, Graph, channel_of
from dinfer.plan.ops import Op
from dinfer.plan.plan import OpPlace, Plan
from dinfer.verdict.headers import has_passed, mismatch, who_lacks
from dinfer.verdict.signs import BUSY, KvBytes, Signs, StackFrame
from dinfer.verdict.waits import RANK, Node, Root, Wait, Waits, stuck_after
from dinfer.verdict.where import link_text, times_text, value_text, waits_for_text


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
    if frame.native:
        return Root("stuck in C", rank, f"{text} and stuck in C ({since}){at}")
    return Root("stuck in Python", rank, f"{text} and stuck in Python ({since}){at}")


class Planned:
    """A `Wait` for every lane that has not ended, and for every rank as a whole that has none.

    `signs`: by rank. `ahead_s`: what will count as stuck in so many seconds counts as stuck now.
    """

    def __init__(
        self, plan: Plan, signs: Sequence[Signs], graph: Graph, sizes: KvBytes, ahead_s: float
    ) -> None:
        self.plan, self.signs, self.graph, self.sizes, self.ahead_s = plan, signs, graph, sizes, ahead_s
        self._broken = {rank: root for rank in range(len(signs)) if (root := self._broken_by(rank))}

    def waits(self) -> Waits:
        return {wait.node: wait for rank in range(len(self.signs)) for wait in self._of_rank(rank)}

    # -- what the signs of life say of a rank or lane by itself

    def _has_lanes(self, rank: int) -> bool:
        """Whether it has its plan, and its lanes' positions are known."""
        signs = self.signs[rank]
        return signs.phase in ("prefill", "decode", "done") and len(signs.positions) == len(
            self.plan.lanes[rank]
        )

    def _heads(self, rank: int) -> list[tuple[Node, Op, bool]]:
        """The rank's lanes that have not ended, the op at which each stands, and whether that has begun."""
        signs = self.signs[rank]
        lanes = enumerate(zip(self.plan.lanes[rank], signs.positions, signs.started, strict=True))
        return [(Node(rank, n), lane.ops[at], begun) for n, (lane, at, begun) in lanes if at < len(lane.ops)]

    def _main_op(self, rank: int) -> Op | None:
        """The op by which to name a rank: the one that it computes, else the first that it is in, else the next one."""
        heads = self._heads(rank) if self._has_lanes(rank) else []
        heads.sort(key=lambda head: (not head[2], head[1].is_transfer, head[1].what == "kv"))
        return heads[0][1] if heads else None

    def _holder(self, rank: int) -> Node | None:
        """The lane whose thread keeps the rank's Python from answering; if that is unknown, the one that computes."""
        begun = [(node, op) for node, op, has_begun in self._heads(rank) if has_begun]
        lanes, name = self.plan.lanes[rank], self.signs[rank].holder
        named = (node for node, _ in begun if lanes[node.lane].name == name)
        return next(chain(named, (node for node, op in begun if not op.is_transfer)), None)

    def _median(self, rank: int, op: Op) -> float:
        """How long such an op takes on that rank; if it has done none, on the others."""
        if own := self.signs[rank].medians.get(op.kind):
            return own
        return median([found for its in self.signs if (found := its.medians.get(op.kind))] or [0.0])

    def _frame(self, node: Node) -> StackFrame | None:
        """Where the lane's thread stands; of a rank that does not answer, only the busy thread is known."""
        signs = self.signs[node.rank]
        mute = signs.answers is False and node == self._holder(node.rank)
        return signs.frames.get(BUSY if mute else self.plan.lanes[node.rank][node.lane].name)

    def _still(self, rank: int, lane: int) -> float:
        """Seconds since that lane has moved."""
        signs = self.signs[rank]
        return signs.still_s[lane] if signs.still_s else signs.quiet_s

    def _partner(self, node: Node) -> OpPlace | None:
        """The place of the other end of the transfer at which the lane stands."""
        first = self.graph.first[self.graph.first_lane[node.rank] + node.lane]
        partner = self.graph.partner[first + self.signs[node.rank].positions[node.lane]]
        return None if partner == NONE else self.graph.place(partner)

    def _is_at(self, place: OpPlace) -> bool:
        """Whether the op at this place has begun and not ended."""
        signs = self.signs[place.rank]
        return signs.positions[place.lane] == place.index and signs.started[place.lane]

    def _is_full(self, place: OpPlace) -> bool:
        """Whether the recv at this place is known to have ended with its bytes."""
        return (place.lane, place.index) in self.signs[place.rank].full

    def _is_ripe(self, still: float, typical: float) -> bool:
        """Whether something that has not moved for so long counts as stuck, unless it uses CPU time."""
        return still + self.ahead_s >= stuck_after(typical)

    def _busy(self, rank: int, text: str, still: float, typical: float, frame: StackFrame | None) -> Root:
        """The root for something that should end by itself."""
        if self._is_ripe(still, typical):
            return busy(rank, self.signs[rank], text, still, typical, frame)
        return Root("moving", rank, f"{text}, at {frame}" if frame else text)

    def _node(self, rank: int, lane: int = RANK) -> Node:
        """The node of a lane, or of its rank if that is judged as a whole."""
        whole = rank in self._broken or not self._has_lanes(rank) or not self._heads(rank)
        return Node(rank) if whole else Node(rank, lane)

    # -- ranks as a whole

    def _of_rank(self, rank: int) -> Iterator[Wait]:
        signs = self.signs[rank]
        wait = Wait(Node(rank), f"is {signs.phase}", signs.quiet_s)
        if root := self._broken.get(rank):
            yield wait._replace(text=root.text, root=root, op=self._main_op(rank))
        elif not self._has_lanes(rank):
            frame = next(iter(signs.frames.values()), None)
            yield wait._replace(root=self._busy(rank, wait.text, signs.quiet_s, 0.0, frame))
        elif heads := self._heads(rank):
            yield from (self._of_lane(*head) for head in heads)
        else:
            yield self._past_lanes(wait)

    def _broken_by(self, rank: int) -> Root | None:
        """What is wrong with a rank as a whole."""
        signs = self.signs[rank]
        raised = signs.raised
        stood = f" in `{op}`" if (op := self._main_op(rank)) else f" ({signs.phase})"
        if raised and not raised.secondary:
            if raised.came and raised.op:
                return mismatch(self.graph, self.signs, rank, raised)
            at = f" at `{raised.op}`" if raised.op else ""
            handler = "" if signs.ended else " and now waits in its own handler"
            return Root("exception", rank, f"raised {raised.message}{at}{handler}")
        if signs.ended:
            return Root("dead", rank, f"{signs.ended}; it stood{stood}")
        if signs.is_stopped:
            return Root("stopped", rank, f"is stopped by a signal or a debugger{stood}")
        if signs.plan_id is not None and signs.plan_id != self.plan.id:
            ids = f"id {signs.plan_id:016x}, the others' is {self.plan.id:016x}"
            return Root("another plan", rank, f"runs another plan ({ids})")
        return Root("lost peer", rank, f"lost its connection: {raised.message}") if raised else None

    def _past_lanes(self, wait: Wait) -> Wait:
        """The wait of a rank that has ended prefill. In decode, every rank compares each token with all others."""
        rank, signs = wait.node.rank, self.signs[wait.node.rank]
        frame = signs.frames.get("decode")
        if signs.phase == "prefill" and any(its.phase == "decode" for its in self.signs):
            text = "has not begun to decode"
            return wait._replace(text=text, root=self._busy(rank, text, signs.quiet_s, 0.0, frame))
        if signs.phase != "decode":
            return wait._replace(text="has done all its ops", root=Root("done", rank, "is done"))
        behind = [
            other
            for other, its in enumerate(self.signs)
            if _token(its) < _token(signs) + (other in self._broken and other != rank)
        ]
        frame = frame or signs.frames.get(BUSY)
        if not behind and frame and frame.waits:
            others = [its.frames.get("decode") for its in self.signs]
            behind = [n for n, at in enumerate(others) if n != rank and not (at and at.waits)]
        if behind:
            text = f"waits for token {signs.decoded} of {', '.join(f'rank {other}' for other in behind)}"
            on = tuple(self._node(other) for other in behind)
            return wait._replace(text=text, on=on, what=f"token {signs.decoded}")
        text, typical = f"computes token {signs.decoded}", signs.medians.get("decode", 0.0)
        return wait._replace(text=text, root=self._busy(rank, text, signs.quiet_s, typical, frame))

    # -- lanes

    def _of_lane(self, node: Node, op: Op, begun: bool) -> Wait:
        wait = Wait(node, f"is in `{op}`", self._still(*node), op=op)
        mute = self.signs[node.rank].answers is False
        if not begun:
            return self._unstarted(wait, op, mute=mute)
        if mute:
            return self._no_answer(wait, op)
        if op.is_transfer:
            return self._transfer(wait, op)
        typical = self._median(node.rank, op)
        return wait._replace(root=self._busy(node.rank, wait.text, wait.still_s, typical, self._frame(node)))

    def _no_answer(self, wait: Wait, op: Op) -> Wait:
        """The wait of a lane of a rank that does not answer: a transfer may have ended without its thread noticing."""
        rank, signs = wait.node.rank, self.signs[wait.node.rank]
        holder = self._holder(rank)
        if holder is not None and holder != wait.node:
            text = f"{wait.text}, and its Python does not answer"
            return wait._replace(text=text, on=(holder,), what="its own Python")
        text = wait.text + ("" if signs.holder or sum(signs.started) == 1 else ", or another of its ops,")
        root = self._busy(rank, text, wait.still_s, self._median(rank, op), self._frame(wait.node))
        return wait._replace(text=text, root=root)

    def _unstarted(self, wait: Wait, op: Op, *, mute: bool) -> Wait:
        rank, lane = wait.node
        signs = self.signs[rank]
        if signs.positions[lane] >= signs.limits[lane]:
            text = f"stands before `{op}`, where it was told to stop"
            return wait._replace(text=text, root=Root("held", rank, text))
        number = self.graph.first[self.graph.first_lane[rank] + lane] + signs.positions[lane]
        makers = zip(self.graph.needs(number), self.graph.deps[number], strict=True)
        unmet = {need: None if maker == NONE else self.graph.place(maker) for need, maker in makers}
        unmet = {n: at for n, at in unmet.items() if at is None or not has_passed(self.signs[at.rank], at)}
        text = f"could begin `{op}`"
        if not unmet and mute and (holder := self._holder(rank)) is not None:
            text += ", and its Python does not answer"
            return wait._replace(text=text, on=(holder,), what="its own Python")
        if not unmet:
            root = self._busy(rank, text, wait.still_s, 0.0, self._frame(wait.node))
            return wait._replace(text=text, root=root)
        need = next((need for need, place in unmet.items() if place is None), next(iter(unmet)))
        text = f"cannot begin `{op}` before {need} is here"
        on = dict.fromkeys(Node(place.rank, place.lane) for place in unmet.values() if place)
        if unmet[need] is None:
            return wait._replace(text=text, root=Root("never sent", rank, f"{text}, which nothing makes"))
        return wait._replace(text=text, on=tuple(on), what=str(need))

    # -- transfers

    def _transfer(self, wait: Wait, op: Op) -> Wait:
        rank, what = wait.node.rank, value_text(op)
        wait = wait._replace(text=waits_for_text(op), detail=link_text(rank, op, self.sizes), what=what)
        place = self._partner(wait.node)
        if place is None and op.kind == "send":
            lacks = f"sends {what} to rank {op.peer}, which nowhere receives it"
            return wait._replace(root=Root("never received", rank, lacks, op.peer))
        if place is None:
            lacks = f"waits for {what}, which rank {op.peer} nowhere sends"
            return wait._replace(root=Root("never sent", rank, lacks, op.peer))
        if has_passed(self.signs[op.peer], place):
            return self._passed_by(wait, op, place)
        other = self._node(op.peer, place.lane)
        if other.lane == RANK or not self._is_at(place):
            return wait._replace(on=(other,))
        return self._met(wait, op, place)

    def _passed_by(self, wait: Wait, op: Op, place: OpPlace) -> Wait:
        """A transfer has ended on the other rank, and not here. That counts from the newer news of the two ranks, since
        those of one may be older."""
        rank, peer, other, what = wait.node.rank, place.rank, self.plan.op(place), wait.what
        still = min(wait.still_s, self._still(place.rank, place.lane))
        if not self._is_ripe(still, self._median(rank, op)):
            root = Root("moving", peer, f"has just ended `{other}`")
        elif peer in self._broken:
            return wait._replace(on=(Node(peer),))
        elif op.kind == "send" and self._is_full(place):
            robbed = who_lacks(self.graph, self.signs, channel_of(rank, op), op.value)
            root = Root("sent twice", rank, f"sends {what} once more, though rank {peer} has it", peer)
            if robbed is not None:
                text = f"sent {what} to rank {peer} in place of rank {robbed}"
                root = Root("wrong peer", rank, text, robbed)
        elif op.kind == "send":
            root = Root("never received", peer, f"has passed `{other}` and not received it", rank)
        elif stalled := next(self._stalled(rank, peer), None):
            return wait._replace(on=(stalled,))
        elif (got := self._who_got(peer, op)) is not None:
            root = Root("wrong peer", peer, f"sent {what} to rank {got} in place of rank {rank}", rank)
        else:
            root = Root("never sent", peer, f"has passed `{other}` and not sent it", rank)
        return wait._replace(root=root)

    def _who_got(self, rank: int, op: Op) -> int | None:
        """Another rank to which `rank` is sending the value of this op, and which has it already."""
        for node, other, begun in self._heads(rank):
            if begun and (other.kind, other.value) == ("send", op.value):
                place = self._partner(node)
                if place and self._is_full(place):
                    return other.peer
        return None

    def _stalled(self, rank: int, peer: int) -> Iterator[Node]:
        """Lanes of `rank` in another transfer with that peer that has begun on both."""
        for node, op, begun in self._heads(rank):
            if begun and op.peer == peer and (place := self._partner(node)) and self._is_at(place):
                yield node

    def _met(self, wait: Wait, op: Op, place: OpPlace) -> Wait:
        """Both ranks are in the transfer: one of them cannot take part, or the link between them is at fault."""
        rank = wait.node.rank
        still = min(wait.still_s, self._still(place.rank, place.lane))
        typical = self._median(rank, op)
        for end, its_op in ((wait.node, op), (Node(place.rank, place.lane), self.plan.op(place))):
            mute, frame = self.signs[end.rank].answers is False, self._frame(end)
            if mute and (holder := self._holder(end.rank)) is not None:
                return wait._replace(on=(holder,))
            if mute or (frame is not None and not frame.waits):
                return wait._replace(root=self._busy(end.rank, f"is in `{its_op}`", still, typical, frame))
        source, target = (rank, op.peer) if op.kind == "send" else (op.peer, rank)
        both = f"the link {source}→{target} has been carrying {wait.what} for {times_text(still, typical)}"
        moves = [end for end in (source, target) if self.signs[end].cpu_moves]
        heads = [head for end in moves for head in self._heads(end)]
        computes = any(begun and not its_op.is_transfer for _, its_op, begun in heads)
        if not self._is_ripe(still, typical) or computes:  # then CPU time says nothing about the link
            root = Root("moving", source, both, target)
        elif moves:
            root = Root("slow link", source, f"{both}, and CPU time moves", target)
        else:
            root = Root("stalled link", source, f"{both}: both ends are there", target)
        # `still`: how long both are there, since one may have waited for the other before.
        return wait._replace(still_s=still, root=root)


def _token(signs: Signs) -> int:
    """How many tokens it has decoded; -1 before decode, a large number after it."""
    return signs.decoded if signs.phase == "decode" else -1 if signs.phase != "done" else 1 << 30

"""What can be known of each rank by itself: where its lanes stand, how long its ops take, and what it is busy with."""

from collections.abc import Sequence
from statistics import median

from dinfer.plan.graph import Graph
from dinfer.plan.ops import Op
from dinfer.plan.plan import OpPlace, Plan
from dinfer.verdict.headers import has_passed
from dinfer.verdict.signs import BUSY, Signs, StackFrame
from dinfer.verdict.waits import Node, Root, stuck_after
from dinfer.verdict.words import times_text

ALIVE = ("prefill", "decode", "done")
"""phases in which a rank has its plan"""


class RankSigns:
    """Of one plan, and signs of life by rank."""

    def __init__(self, plan: Plan, signs: Sequence[Signs], graph: Graph, ahead_s: float = 0.0) -> None:
        self.plan, self.graph, self.ahead_s = plan, graph, ahead_s
        self.signs = dict(enumerate(signs))

    def has_lanes(self, rank: int) -> bool:
        signs, lanes = self.signs[rank], self.plan.lanes[rank]
        return signs.phase in ALIVE and len(signs.positions) == len(lanes)

    def busy(self, rank: int, text: str, still: float, typical: float, frame: StackFrame | None) -> Root:
        """What is to be said of something that should end by itself."""
        if not self.is_ripe(still, typical):
            return Root("moving", rank, f"{text}, at {frame}" if frame else text)
        return busy(rank, self.signs[rank], text, still, typical, frame)

    def is_ripe(self, still: float, typical: float) -> bool:
        """Whether something that has not moved for so long counts as stuck, unless it computes."""
        return still + self.ahead_s >= stuck_after(typical)

    def main_op(self, rank: int) -> Op | None:
        """The op to name a rank by: what it computes, else the first that it is in, else the next."""
        signs = self.signs[rank]
        if not self.has_lanes(rank):
            return None
        lanes = zip(self.plan.lanes[rank], signs.positions, signs.started, strict=True)
        heads = [(lane.ops[at], started) for lane, at, started in lanes if at < len(lane.ops)]
        heads.sort(key=lambda head: (not head[1], head[0].is_transfer, head[0].what == "kv"))
        return heads[0][0] if heads else None

    def holder(self, rank: int) -> Node | None:
        """The lane that keeps a rank from answering; where nobody knows which, the one that computes."""
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
        """The lane of a rank that is in an op which is no transfer."""
        signs = self.signs[rank]
        for number, lane in enumerate(self.plan.lanes[rank]):
            at = signs.positions[number]
            if signs.started[number] and at < len(lane.ops) and not lane.ops[at].is_transfer:
                return Node(rank, number)
        return None

    def median(self, rank: int, op: Op) -> float:
        """How long such an op takes on that rank; as on the others where it has done none."""
        if own := self.signs[rank].medians.get(op.kind):
            return own
        return median([found for its in self.signs.values() if (found := its.medians.get(op.kind))] or [0.0])

    def frame(self, node: Node) -> StackFrame | None:
        """Where the lane's thread stands; of a rank that was dumped only the thread is known that is busy."""
        signs, lane = self.signs[node.rank], self.plan.lanes[node.rank][node.lane]
        if signs.answers is False and node == self.holder(node.rank):
            return signs.frames.get(BUSY)
        return signs.frames.get(lane.name)

    def is_past(self, rank: int) -> bool:
        signs = self.signs[rank]
        lanes = zip(signs.positions, self.plan.lanes[rank], strict=True)
        return all(at == len(lane.ops) for at, lane in lanes)

    def number(self, node: Node) -> int:
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
        signs = self.signs[place.rank]
        return signs.still_s[place.lane] if signs.still_s else signs.quiet_s


def busy(rank: int, signs: Signs, text: str, still: float, typical: float, frame: StackFrame | None) -> Root:
    """What is to be said of something that should end by itself, and has been under way for too long."""
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

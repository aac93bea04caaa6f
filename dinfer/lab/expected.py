"""The lab's faults: where each can strike, and what its verdict must say. One table; pure."""

from typing import NamedTuple

from dinfer.plan.graph import Graph, channel_of
from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan
from dinfer.verdict.waits import HangKind
from dinfer.verdict.where import value_text

ANY_OP = ("layer", "recv kv", "send kv")

SENDS = ("send kv", "send hidden")


class ExpectedRule(NamedTuple):
    """`at`: the ops at which it strikes: the first of these that the rank has for the block; `kind`: the kind of the
    verdict; `who`: the rank it must name; `is_slow`: the run goes on, and the verdict comes on request."""

    at: tuple[str, ...]
    kind: HangKind
    who: str
    is_slow: bool = False


RULES: dict[str, ExpectedRule] = {
    "skip a send": ExpectedRule(SENDS, "never sent", "the rank that did not send"),
    "skip a recv": ExpectedRule(("recv kv",), "never received", "the rank that did not receive"),
    "reorder two": ExpectedRule(("send kv",), "out of order", "the rank that sent"),
    "wrong size": ExpectedRule(SENDS, "other size", "the rank that sent"),
    "duplicate": ExpectedRule(SENDS, "sent twice", "the rank that sent"),
    "wrong peer": ExpectedRule(("send kv",), "wrong peer", "the rank that sent"),
    "another plan": ExpectedRule(
        ("send kv", "recv kv", "send hidden"), "another plan", "the rank whose plan is not the others'"
    ),
    "exception": ExpectedRule(("layer",), "exception", "the rank that raised"),
    "stall in Python": ExpectedRule(ANY_OP, "stuck in Python", "the rank that is stuck"),
    "stall in C": ExpectedRule(ANY_OP, "stuck in C", "the rank that is stuck"),
    "stall in C with the GIL": ExpectedRule(ANY_OP, "stuck in C", "the rank that is stuck"),
    "SIGSTOP": ExpectedRule(ANY_OP, "stopped", "the rank that is stopped"),
    "SIGKILL": ExpectedRule(ANY_OP, "dead", "the rank that is gone"),
    "slow rank 2x": ExpectedRule(("layer",), "slow rank", "the slow rank", is_slow=True),
    "slow rank 10x": ExpectedRule(("layer",), "slow rank", "the slow rank", is_slow=True),
    "slow link": ExpectedRule(SENDS, "slow link", "the rank at the link's beginning", is_slow=True),
    "link cut": ExpectedRule(SENDS, "stalled link", "the rank at the link's beginning"),
}

LEAVES_THE_OP_OUT = ("another plan", "slow rank", "slow link", "dead", "stopped")
"""kinds whose sentence may name another op than the one at which the fault struck: that names the first op that was
noticed, and a rank that has ended had lanes in several ops"""


class Cell(NamedTuple):
    """One trial: a fault on a rank, striking when the rank comes to a block, in a run of a plan."""

    fault: str
    rank: int
    layer: int
    chunk: int
    strategy: str
    schedule: str

    def __str__(self) -> str:
        return (
            f"{self.fault}, rank {self.rank}, c{self.chunk} l{self.layer}, {self.strategy}, {self.schedule}"
        )


class Expected(NamedTuple):
    """What the verdict must say. `op`: the op that its sentence must name, "" for any; `also`: values that it may name
    instead, which are what the op carries; `or_rank`: a rank that it may name instead of `rank`."""

    kind: HangKind
    rank: int
    op: str = ""
    also: tuple[str, ...] = ()
    or_rank: int | None = None

    def is_met_by(self, kind: str, rank: int | None, sentence: str) -> bool:
        named = not self.op or f"`{self.op}`" in sentence or any(text in sentence for text in self.also)
        return kind == self.kind and rank is not None and rank in (self.rank, self.or_rank) and named


def target(graph: Graph, cell: Cell) -> Op | None:
    """The op at which the fault strikes; None if it cannot strike there."""
    mine = [
        op
        for lane in graph.plan.lanes[cell.rank]
        for op in lane.ops
        if (op.chunk, op.layer) == (cell.chunk, cell.layer)
    ]
    named = {name: op for op in reversed(mine) for name in (op.kind, f"{op.kind} {op.what}")}
    found = next((named[name] for name in RULES[cell.fault].at if name in named), None)
    return found if found and _can_strike(graph, cell, found) else None


def _can_strike(graph: Graph, cell: Cell, op: Op) -> bool:
    if cell.fault == "reorder two":
        return following(graph, cell.rank, op) is not None
    if cell.fault == "wrong peer":
        return not _listens(graph.plan, cell, op) or _listens_later(graph, cell, op)
    if RULES[cell.fault].is_slow:  # it stays slow from its op on, so that op must be the rank's first
        return cell.chunk == 0 and cell.layer == graph.plan.shape.starts[cell.rank]
    return True


def following(graph: Graph, rank: int, op: Op) -> Op | None:
    """The next send on the same channel; None if it is the last, or the rank does not send it."""
    numbers, _ = graph.channels.get(channel_of(rank, op), ([], []))
    sends = [graph.ops[number] for number in numbers]
    after = sends[sends.index(op) + 1 :] if op in sends else []
    return after[0] if after else None


def third(plan: Plan, rank: int, op: Op) -> int:
    """A rank that is neither `rank` nor the op's peer."""
    return next(other for other in range(plan.world_size) if other not in (rank, op.peer))


def _listens(plan: Plan, cell: Cell, op: Op) -> bool:
    """Whether the third rank ever receives something of this kind from this one."""
    other = third(plan, cell.rank, op)
    return any(
        (it.kind, it.what, it.peer) == ("recv", op.what, cell.rank)
        for lane in plan.lanes[other]
        for it in lane.ops
    )


def _listens_later(graph: Graph, cell: Cell, op: Op) -> bool:
    """Whether it receives more of it after this value."""
    own = op._replace(peer=third(graph.plan, cell.rank, op))
    return following(graph, cell.rank, own) is not None


def expected(graph: Graph, cell: Cell, *, in_network: bool = False) -> Expected:
    """What the verdict on a possible cell must say. `in_network`: links are broken in the network, for every transfer
    between the two ranks."""
    op, kind = target(graph, cell), RULES[cell.fault].kind
    assert op
    if cell.fault == "wrong peer" and not _listens(graph.plan, cell, op):
        kind = "stalled link"  # no rank has received it: sender and receiver wait for each other
    # A rank whose GIL is held cannot report in which of several transfers it is.
    mute = cell.fault == "stall in C with the GIL" and op.is_transfer
    named = "" if kind in LEAVES_THE_OP_OUT or mute else str(op)
    also = (str(op.value), value_text(op)) if named and op.is_transfer else ()
    found = Expected(kind, cell.rank, named, also)
    return _in_network(graph, cell, op, found) if in_network else found


def _in_network(graph: Graph, cell: Cell, op: Op, found: Expected) -> Expected:
    """A cut link stops all transfers on it, and the verdict may name any of them. A slow link slows both directions if
    blocks go both ways, since requests for blocks go against their direction."""
    if cell.fault == "link cut":
        return found._replace(also=(*found.also, f"the link {cell.rank}→{op.peer} "))
    channel = channel_of(cell.rank, op)
    back = channel._replace(source=channel.target, target=channel.source)
    return found._replace(or_rank=op.peer) if cell.fault == "slow link" and back in graph.channels else found

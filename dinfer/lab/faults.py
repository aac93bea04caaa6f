"""The lab's faults: where each can strike, the commands that make ranks commit it, and what the verdict must say.

Pure. Start at the table RULES.
"""

import random
from typing import NamedTuple

from msgspec.structs import replace

from dinfer.lab.hosts import LabNetwork
from dinfer.messages import Misbehave
from dinfer.plan.graph import Graph, channel_of
from dinfer.plan.ops import Op
from dinfer.verdict.waits import HUNG, HangKind
from dinfer.verdict.where import value_text


class LabFault(NamedTuple):
    """`at`: the ops at which it strikes: the first of these that the rank has for the block; `kind`: the kind of the
    verdict; `who`: the rank it must name; `act`: the misbehaviour, None if it depends on more than the op."""

    at: tuple[str, ...]
    kind: HangKind
    who: str
    act: Misbehave | None = None

    @property
    def is_slow(self) -> bool:
        """Whether the run goes on, and the verdict comes on request."""
        return self.kind not in HUNG


ANY_OP, SENDS = ("layer", "recv kv", "send kv"), ("send kv", "send hidden")

RULES: dict[str, LabFault] = {
    "skip a send": LabFault(SENDS, "never sent", "the rank that did not send", Misbehave(act="skip")),
    "skip a recv": LabFault(
        ("recv kv",), "never received", "the rank that did not receive", Misbehave(act="skip")
    ),
    "reorder two": LabFault(("send kv",), "out of order", "the rank that sent"),
    "wrong size": LabFault(SENDS, "other size", "the rank that sent", Misbehave(act="longer")),
    "duplicate": LabFault(SENDS, "sent twice", "the rank that sent", Misbehave(act="twice")),
    "wrong peer": LabFault(("send kv",), "wrong peer", "the rank that sent"),
    "another plan": LabFault(
        ("send kv", "recv kv", "send hidden"),
        "another plan",
        "the rank whose plan is not the others'",
        Misbehave(act="another plan"),
    ),
    "exception": LabFault(("layer",), "exception", "the rank that raised", Misbehave(act="raise")),
    "stall in Python": LabFault(ANY_OP, "stuck in Python", "the rank that is stuck", Misbehave(act="stall")),
    "stall in C": LabFault(ANY_OP, "stuck in C", "the rank that is stuck", Misbehave(act="stall in C")),
    "stall in C with the GIL": LabFault(
        ANY_OP, "stuck in C", "the rank that is stuck", Misbehave(act="stall with GIL")
    ),
    "SIGSTOP": LabFault(
        ANY_OP, "stopped", "the rank that is stopped", Misbehave(act="signal", signal="SIGSTOP")
    ),
    "SIGKILL": LabFault(ANY_OP, "dead", "the rank that is gone", Misbehave(act="signal", signal="SIGKILL")),
    "slow rank 2x": LabFault(("layer",), "slow rank", "the slow rank"),
    "slow rank 10x": LabFault(("layer",), "slow rank", "the slow rank"),
    "slow link": LabFault(SENDS, "slow link", "the rank at the link's beginning"),
    "link cut": LabFault(SENDS, "stalled link", "the rank at the link's beginning"),
}


class Cell(NamedTuple):
    """One trial: a fault on a rank, striking when the rank comes to a block, in a run of a plan."""

    fault: str
    rank: int
    layer: int
    chunk: int
    strategy: str
    schedule: str

    def __str__(self) -> str:
        place = f"rank {self.rank}, c{self.chunk} l{self.layer}"
        return f"{self.fault}, {place}, {self.strategy}, {self.schedule}"


def target(graph: Graph, cell: Cell) -> Op | None:
    """The op at which the fault strikes; None if it cannot strike there."""
    ops = [op for lane in graph.plan.lanes[cell.rank] for op in lane.ops]
    mine = [op for op in ops if (op.chunk, op.layer) == (cell.chunk, cell.layer)]
    named = {name: op for op in reversed(mine) for name in (op.kind, f"{op.kind} {op.what}")}
    op = next((named[name] for name in RULES[cell.fault].at if name in named), None)
    can_strike = op is not None
    if op and cell.fault == "reorder two":
        can_strike = following(graph, cell.rank, op) is not None
    elif (
        op and cell.fault == "wrong peer"
    ):  # the third rank notices if it expects nothing, or more after this value
        astray = to_third(graph, cell.rank, op)
        more = following(graph, cell.rank, astray) is not None
        can_strike = more or not _is_awaited(graph, cell.rank, astray)
    elif RULES[cell.fault].is_slow:  # it stays slow from its op on, so that op must be the rank's first
        can_strike = cell.chunk == 0 and cell.layer == graph.plan.shape.starts[cell.rank]
    return op if can_strike else None


def following(graph: Graph, rank: int, op: Op) -> Op | None:
    """The next send on the same channel; None if it is the last, or the rank does not send it."""
    numbers, _ = graph.channels.get(channel_of(rank, op), ([], []))
    sends = [graph.ops[number] for number in numbers]
    after = sends[sends.index(op) + 1 :] if op in sends else []
    return after[0] if after else None


def to_third(graph: Graph, rank: int, op: Op) -> Op:
    """The same op with a peer that is neither `rank` nor the op's peer."""
    ranks = range(graph.plan.world_size)
    return op._replace(peer=next(other for other in ranks if other not in (rank, op.peer)))


def _is_awaited(graph: Graph, rank: int, send: Op) -> bool:
    """Whether the send's peer ever receives from `rank` on that channel."""
    _, recvs = graph.channels.get(channel_of(rank, send), ([], []))
    return bool(recvs)


# -- what the verdict must say

LEAVES_THE_OP_OUT = ("another plan", "slow rank", "slow link", "dead", "stopped")
"""kinds whose sentence may name another op than the one at which the fault struck: that names the first op that was
noticed, and a rank that has ended had lanes in several ops"""


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


def expected(graph: Graph, cell: Cell, *, in_network: bool = False) -> Expected:
    """What the verdict on a possible cell must say. `in_network`: links are broken in the network, for every transfer
    between the two ranks."""
    op, kind = target(graph, cell), RULES[cell.fault].kind
    assert op
    if cell.fault == "wrong peer" and not _is_awaited(graph, cell.rank, to_third(graph, cell.rank, op)):
        kind = "stalled link"  # no rank has received it: sender and receiver wait for each other
    # A rank whose GIL is held cannot report in which of several transfers it is.
    mute = cell.fault == "stall in C with the GIL" and op.is_transfer
    named = "" if kind in LEAVES_THE_OP_OUT or mute else str(op)
    also = (str(op.value), value_text(op)) if named and op.is_transfer else ()
    found = Expected(kind, cell.rank, named, also)
    if in_network and cell.fault == "link cut":
        # It stops all transfers on it, and the verdict may name any of them.
        return found._replace(also=(*also, f"the link {cell.rank}→{op.peer} "))
    if in_network and cell.fault == "slow link":
        # Both directions are slow if blocks go both ways, since requests for blocks go against their direction.
        there = channel_of(cell.rank, op)
        if there._replace(source=there.target, target=there.source) in graph.channels:
            return found._replace(or_rank=op.peer)
    return found


# -- commands: misbehave, and be slow enough for the fault to be seen

PACE_S = 0.02
"""added to every layer op, so that ranks run at about the same speed whatever else the machine does"""

SLOW_PACE_S = 0.04
"""the same for cells about slow ranks and links, where a busy machine must not make another rank slow"""

SLOW_WIRE_S = 0.06

SLOW_BITS_PER_S = 250_000
"""of a slow wire between hosts: a block of the demo model, 2 KiB, then takes about SLOW_WIRE_S"""

TIMES = {"slow rank 2x": 2.2, "slow rank 10x": 10.0}
"""factors on the pace; 2x is a bit more than 2, as the layer itself is not slowed"""


def pace(seconds: float = PACE_S, *, spin: bool = False) -> Misbehave:
    return Misbehave(act="pace", of="layer", seconds=seconds, spin=spin)


def orders(graph: Graph, cell: Cell | None, network: LabNetwork | None = None) -> dict[int, list[Misbehave]]:
    """Commands by rank, in order; without a cell, those of a clean run. `network`: where links are broken, with the
    host of each rank; None: in the transport."""
    ranks = range(graph.plan.world_size)
    seconds = SLOW_PACE_S if cell and RULES[cell.fault].is_slow else PACE_S
    found = {rank: [pace(seconds)] for rank in ranks}
    if cell is None:
        return found
    if cell.fault in TIMES:
        found[cell.rank] = [pace(seconds * TIMES[cell.fault])]
        return found
    op = target(graph, cell)
    assert op
    rank, order = _order(graph, cell, op, network)
    found[rank].append(order)
    return found


def _order(graph: Graph, cell: Cell, op: Op, network: LabNetwork | None) -> tuple[int, Misbehave]:
    """The rank that commits the fault, and its command. A wire is broken by the rank that is about to send over it."""
    rank, this = cell.rank, str(op)
    if act := RULES[cell.fault].act:
        return rank, replace(act, ops=(this,))
    if cell.fault == "reorder two":
        return rank, Misbehave(act="reorder", ops=(this, str(following(graph, rank, op))))
    if cell.fault == "wrong peer":
        astray = to_third(graph, rank, op)
        ops = (this, str(astray)) if following(graph, rank, astray) else (this,)
        return rank, Misbehave(act="elsewhere", ops=ops, wire=(astray.peer,))
    is_cut = cell.fault == "link cut"
    if network:
        command = network.cut(rank, op.peer) if is_cut else network.slow(rank, op.peer, SLOW_BITS_PER_S)
        return rank, Misbehave(act="command", ops=(this,), command=command)
    if is_cut:
        return op.peer, Misbehave(act="cut", ops=(str(op._replace(kind="recv", peer=rank)),))
    return op.peer, Misbehave(act="slow wire", of="recv", peer=rank, wire=(SLOW_WIRE_S,))


def slowed(seed: int, ranks: int) -> dict[int, list[Misbehave]]:
    """Commands by rank for a run that is slow but moves. The seed decides: how much each rank's layers are slowed, by a
    factor of 1 to 10; which ranks compute meanwhile and which sleep; and whether a rank also receives slowly."""
    draw = random.Random(seed)
    base = draw.choice((0.02, 0.05, 0.1))
    found = {rank: [pace(base * draw.uniform(1, 10), spin=draw.random() < 0.3)] for rank in range(ranks)}
    if draw.random() < 0.3:
        wire = Misbehave(act="slow wire", of="recv", wire=(draw.uniform(1, 10) * 0.02,))
        found[draw.randrange(ranks)].append(wire)
    return found

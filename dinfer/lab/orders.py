"""The commands that make ranks misbehave as a cell requires, and that slow a run enough for the fault to be seen."""

import random

from dinfer.lab.expected import RULES, Cell, following, target, third
from dinfer.lab.hosts import LabNetwork
from dinfer.messages import Message
from dinfer.plan.graph import Graph
from dinfer.plan.ops import Op

PACE_S = 0.02
"""added to every layer op, so that ranks run at about the same speed whatever else the machine does"""

SLOW_PACE_S = 0.04
"""the same for cells about slow ranks and links, where a busy machine must not make another rank slow"""

SLOW_WIRE_S = 0.06

SLOW_BITS_PER_S = 250_000
"""of a slow wire between hosts: a block of the demo model, 2 KiB, then takes about SLOW_WIRE_S"""

TIMES = {"slow rank 2x": 2.2, "slow rank 10x": 10.0}
"""factors on the pace; 2x is a bit more than 2, as the layer itself is not slowed"""

SLOWED_S = (0.02, 0.05, 0.1)

SLOWED_TIMES = (1, 10)

ACTS: dict[str, Message] = {
    "skip a send": {"act": "skip"},
    "skip a recv": {"act": "skip"},
    "wrong size": {"act": "longer"},
    "duplicate": {"act": "twice"},
    "another plan": {"act": "another plan"},
    "exception": {"act": "raise"},
    "stall in Python": {"act": "stall"},
    "stall in C": {"act": "stall in C"},
    "stall in C with the GIL": {"act": "stall with GIL"},
    "SIGSTOP": {"act": "signal", "signal": "SIGSTOP"},
    "SIGKILL": {"act": "signal", "signal": "SIGKILL"},
}
"""misbehaviour that needs no more than the op at which it strikes"""


def pace(seconds: float = PACE_S, *, spin: bool = False) -> Message:
    return {"do": "misbehave", "act": "pace", "of": "layer", "seconds": seconds, "spin": spin}


def orders(graph: Graph, cell: Cell | None, network: LabNetwork | None = None) -> dict[int, list[Message]]:
    """Commands by rank, in order; without a cell, those of a clean run. `network`: where links are broken, with the
    host of each rank; None: in the transport."""
    ranks = range(graph.plan.world_size)
    if cell is None:
        return {rank: [pace()] for rank in ranks}
    if cell.fault in TIMES:
        slow = pace(SLOW_PACE_S * TIMES[cell.fault])
        return {rank: [slow if rank == cell.rank else pace(SLOW_PACE_S)] for rank in ranks}
    seconds = SLOW_PACE_S if RULES[cell.fault].is_slow else PACE_S
    found = {rank: [pace(seconds)] for rank in ranks}
    op = target(graph, cell)
    assert op
    rank, order = _of_network(network, cell, op) or _order(graph, cell, op)
    found[rank].append({"do": "misbehave", **order})
    return found


def slowed(seed: int, ranks: int) -> dict[int, list[Message]]:
    """Commands by rank for a run that is slow but moves. The seed decides: how much each rank's layers are slowed, by a
    factor of 1 to 10; which ranks compute meanwhile and which sleep; and whether a rank also receives slowly."""
    draw = random.Random(seed)
    base = draw.choice(SLOWED_S)
    found = {
        rank: [pace(base * draw.uniform(*SLOWED_TIMES), spin=draw.random() < 0.3)] for rank in range(ranks)
    }
    if draw.random() < 0.3:
        wire = {"act": "slow wire", "of": "recv", "with": [draw.uniform(*SLOWED_TIMES) * SLOWED_S[0]]}
        found[draw.randrange(ranks)].append({"do": "misbehave", **wire})
    return found


def _of_network(network: LabNetwork | None, cell: Cell, op: Op) -> tuple[int, Message] | None:
    """The command that breaks a wire, run by the rank that is about to send over it; None if no wire is broken."""
    if network and cell.fault == "slow link":
        command = network.slow(cell.rank, op.peer, SLOW_BITS_PER_S)
    elif network and cell.fault == "link cut":
        command = network.cut(cell.rank, op.peer)
    else:
        return None
    return cell.rank, {"act": "command", "ops": [str(op)], "command": command}


def _order(graph: Graph, cell: Cell, op: Op) -> tuple[int, Message]:
    if cell.fault == "reorder two":
        return cell.rank, {"act": "reorder", "ops": [str(op), str(following(graph, cell.rank, op))]}
    if cell.fault == "wrong peer":
        other = third(graph.plan, cell.rank, op)
        own = op._replace(peer=other)
        ops = [str(op)] + [str(own)] * (following(graph, cell.rank, own) is not None)
        return cell.rank, {"act": "elsewhere", "ops": ops, "with": [other]}
    if cell.fault == "slow link":
        return op.peer, {"act": "slow wire", "of": "recv", "peer": cell.rank, "with": [SLOW_WIRE_S]}
    if cell.fault == "link cut":
        return op.peer, {"act": "cut", "ops": [str(op._replace(kind="recv", peer=cell.rank))]}
    return cell.rank, {**ACTS[cell.fault], "ops": [str(op)]}

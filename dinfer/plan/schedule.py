"""Schedules: the rules that put ops on lanes. And the sync strategies: which rank sends a block to which.

`lockstep`   one lane a rank; all ranks sync each layer before the next one starts.
`pipelined`  compute, hidden states and KV have lanes of their own; other ranks' KV is first needed in decode, so its
             sync does not delay prefill.
`batched`    one lane a rank; a rank computes its whole stage, then syncs all its layers, and all ranks send first. It
             hangs if a send waits for its recv, and `verify` refutes it: an example for the debugger.
"""

from collections.abc import Callable, Iterator

from dinfer.config import Schedule, SyncStrategy
from dinfer.plan.ops import FINAL, Op, PlanError, Value, recv, send
from dinfer.plan.partition import Block, Shape
from dinfer.plan.plan import Lane, Plan

Hop = tuple[int, int]  # source and target rank
Hops = Callable[[int, int], list[Hop]]  # by owner and world size: how its blocks reach all other ranks


def pairwise(owner: int, world_size: int) -> list[Hop]:
    """The owner sends to each other rank, starting with the next one.

    Each owner starts with another peer, so owners that sync at the same time do not use the same link.
    """
    return [(owner, (owner + step) % world_size) for step in range(1, world_size)]


def ring(owner: int, world_size: int) -> list[Hop]:
    """Each rank sends the block on to the next one until all ranks have it."""
    return [((owner + step - 1) % world_size, (owner + step) % world_size) for step in range(1, world_size)]


STRATEGIES: dict[SyncStrategy, Hops] = {"pairwise": pairwise, "ring": ring}


def build(shape: Shape, schedule: Schedule, sync_strategy: SyncStrategy) -> Plan:
    """Expand a schedule and a sync strategy to a plan. Raises PlanError for an unknown name."""
    for given, known in ((schedule, SCHEDULES), (sync_strategy, STRATEGIES)):
        if given not in known:
            raise PlanError(f"{given!r} is unknown; it must be one of {', '.join(known)}.")
    lanes: list[dict[str, list[Op]]] = [{} for _ in shape.starts]
    for rank, name, op in SCHEDULES[schedule](shape, STRATEGIES[sync_strategy]):
        lanes[rank].setdefault(name, []).append(op)
    built = tuple(tuple(Lane(name, tuple(ops)) for name, ops in rank.items()) for rank in lanes)
    return Plan(shape, schedule, sync_strategy, built)


def compute_order(shape: Shape) -> list[Block]:
    """All blocks in the order in which a pipeline computes them if all layers take equally long.

    It extends the order of the data flow, so lanes that carry blocks in this order cannot deadlock.
    """
    ended: dict[Block, int] = {}
    free = [0] * shape.world_size
    for chunk in range(len(shape.chunks)):
        for index, rank in enumerate(shape.owners):
            free[rank] = ended[chunk, index] = max(free[rank], ended.get((chunk, index - 1), 0)) + 1
    return sorted(ended, key=lambda block: (ended[block], block))


Placed = tuple[int, str, Op]  # rank, lane, and the op that comes next there

MAIN = ("main", "main", "main")
PIPES = ("compute", "hidden-out", "hidden-in")
"""the lanes of computing ops, and of hidden states sent and received"""


def _transfer(shape: Shape, value: Value, hop: Hop, out: str, into: str) -> Iterator[Placed]:
    source, target = hop
    tokens = 1 if value == FINAL else len(shape.chunks[value.chunk])
    yield source, out, send(value, target, tokens)
    yield target, into, recv(value, source, tokens)


def _enter_stage(shape: Shape, chunk: int, rank: int, lanes: tuple[str, str, str]) -> Iterator[Placed]:
    """Rank 0 embeds the chunk; another rank receives its hidden state from the rank before."""
    if rank == 0:
        yield rank, lanes[0], Op("embed", chunk)
    else:
        yield from _transfer(shape, Value("hidden", chunk, shape.starts[rank]), (rank - 1, rank), *lanes[1:])


def _final(shape: Shape, lanes: tuple[str, str, str]) -> Iterator[Placed]:
    """The last rank computes the final norm of the last token and sends it to all ranks, for the first new token."""
    last = shape.world_size - 1
    yield last, lanes[0], Op("norm", len(shape.chunks) - 1, shape.layers)
    for peer in range(last):
        yield from _transfer(shape, FINAL, (last, peer), *lanes[1:])


def _pipelined(shape: Shape, hops: Hops) -> Iterator[Placed]:
    for rank, stage in enumerate(shape.stages):
        for chunk in range(len(shape.chunks)):
            yield from _enter_stage(shape, chunk, rank, PIPES)
            for index in stage:
                yield rank, "compute", Op("layer", chunk, index)
    yield from _final(shape, PIPES)
    for chunk, index in compute_order(shape):
        for hop in hops(shape.owners[index], shape.world_size):
            yield from _transfer(shape, Value("kv", chunk, index), hop, f"kv-out:{hop[1]}", f"kv-in:{hop[0]}")


def _lockstep(shape: Shape, hops: Hops) -> Iterator[Placed]:
    for chunk in range(len(shape.chunks)):
        for rank, stage in enumerate(shape.stages):
            yield from _enter_stage(shape, chunk, rank, MAIN)
            for index in stage:
                yield rank, "main", Op("layer", chunk, index)
                for hop in hops(rank, shape.world_size):
                    yield from _transfer(shape, Value("kv", chunk, index), hop, "main", "main")
    yield from _final(shape, MAIN)


def _batched(shape: Shape, hops: Hops) -> Iterator[Placed]:
    for chunk in range(len(shape.chunks)):
        for rank, stage in enumerate(shape.stages):
            yield from _enter_stage(shape, chunk, rank, MAIN)
            for index in stage:
                yield rank, "main", Op("layer", chunk, index)
        for kth_hops in zip(*(hops(rank, shape.world_size) for rank in range(shape.world_size)), strict=True):
            synced = list[Placed]()
            for hop, stage in zip(kth_hops, shape.stages, strict=True):
                for index in stage:
                    synced += _transfer(shape, Value("kv", chunk, index), hop, "main", "main")
            yield from (one for one in synced if one[2].kind == "send")
            yield from (one for one in synced if one[2].kind == "recv")
    yield from _final(shape, MAIN)


SCHEDULES: dict[Schedule, Callable[[Shape, Hops], Iterator[Placed]]] = {
    "pipelined": _pipelined,
    "lockstep": _lockstep,
    "batched": _batched,
}

"""Schedules: the rules that put ops on lanes. And the sync strategies: which rank sends a block to which.

`lockstep`   one lane a rank; all ranks sync each layer before the next one starts.
`pipelined`  compute, hidden states and KV have lanes of their own; other ranks' KV is first needed in decode, so its
             sync does not delay prefill.
`batched`    one lane a rank; a rank computes its whole stage, then syncs all its layers, and all ranks send first. It
             hangs if a send waits for its recv, and `verify` refutes it: an example for the debugger.
"""

from collections.abc import Callable, Iterator

from dinfer.config import Schedule, SyncStrategy
from dinfer.plan.ops import FINAL, Op, PlanError, Value, embed, layer, norm, recv, send
from dinfer.plan.partition import Block, Shape
from dinfer.plan.plan import Lane, Plan

Hop = tuple[int, int]
"""source and target rank"""


def pairwise(owner: int, world_size: int) -> list[Hop]:
    """The owner sends to each other rank, starting with the next one.

    Each owner starts with another peer, so owners that sync at the same time do not use the same link.
    """
    return [(owner, (owner + step) % world_size) for step in range(1, world_size)]


def ring(owner: int, world_size: int) -> list[Hop]:
    """Each rank sends the block on to the next one until all ranks have it."""
    return [((owner + step - 1) % world_size, (owner + step) % world_size) for step in range(1, world_size)]


STRATEGIES: dict[SyncStrategy, Callable[[int, int], list[Hop]]] = {"pairwise": pairwise, "ring": ring}

Hops = Callable[[int, int], list[Hop]]


def build(shape: Shape, schedule: Schedule, sync_strategy: SyncStrategy) -> Plan:
    """Expand a schedule and a sync strategy to a plan. Raises PlanError for an unknown name."""
    for given, known in ((schedule, SCHEDULES), (sync_strategy, STRATEGIES)):
        if given not in known:
            raise PlanError(f"{given!r} is unknown; it must be one of {', '.join(known)}.")
    lanes = _LaneBuilder(shape)
    SCHEDULES[schedule](shape, STRATEGIES[sync_strategy], lanes)
    return Plan(shape, schedule, sync_strategy, lanes.build())


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


class _LaneBuilder:
    """Collects the ops of each rank's lanes. A lane is added with its first op."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._sizes = [len(chunk) for chunk in shape.chunks]
        self._lanes: list[dict[str, list[Op]]] = [{} for _ in shape.starts]

    def put(self, rank: int, lane: str, op: Op) -> None:
        self._lanes[rank].setdefault(lane, []).append(op)

    def transfer(self, value: Value, hop: Hop, out: str, into: str) -> None:
        self.put(hop[0], out, send(value, hop[1], self.tokens(value)))
        self.put(hop[1], into, recv(value, hop[0], self.tokens(value)))

    def tokens(self, value: Value) -> int:
        return 1 if value == FINAL else self._sizes[value.chunk]

    def build(self) -> tuple[tuple[Lane, ...], ...]:
        return tuple(tuple(Lane(name, tuple(ops)) for name, ops in rank.items()) for rank in self._lanes)


def _final(shape: Shape, lanes: _LaneBuilder, compute: str, out: str, into: str) -> None:
    """The last rank computes the final norm of the last token and sends it to all ranks, for the first new token."""
    last = shape.world_size - 1
    lanes.put(last, compute, norm(len(shape.chunks) - 1, shape.layers))
    for peer in range(last):
        lanes.transfer(FINAL, (last, peer), out, into)


def _pipelined(shape: Shape, hops: Hops, lanes: _LaneBuilder) -> None:
    for rank, stage in enumerate(shape.stages):
        for chunk in range(len(shape.chunks)):
            if rank == 0:
                lanes.put(rank, "compute", embed(chunk))
            else:
                entering = Value("hidden", chunk, stage.start)
                lanes.transfer(entering, (rank - 1, rank), "hidden-out", "hidden-in")
            for index in stage:
                lanes.put(rank, "compute", layer(chunk, index))
    _final(shape, lanes, "compute", "hidden-out", "hidden-in")
    for chunk, index in compute_order(shape):
        for source, target in hops(shape.owners[index], shape.world_size):
            lanes.transfer(Value("kv", chunk, index), (source, target), f"kv-out:{target}", f"kv-in:{source}")


def _lockstep(shape: Shape, hops: Hops, lanes: _LaneBuilder) -> None:
    for chunk in range(len(shape.chunks)):
        for rank, stage in enumerate(shape.stages):
            _enter_stage(chunk, rank, stage, lanes)
            for index in stage:
                lanes.put(rank, "main", layer(chunk, index))
                for hop in hops(rank, shape.world_size):
                    lanes.transfer(Value("kv", chunk, index), hop, "main", "main")
    _final(shape, lanes, "main", "main", "main")


def _batched(shape: Shape, hops: Hops, lanes: _LaneBuilder) -> None:
    for chunk in range(len(shape.chunks)):
        for rank, stage in enumerate(shape.stages):
            _enter_stage(chunk, rank, stage, lanes)
            for index in stage:
                lanes.put(rank, "main", layer(chunk, index))
        for round_of_hops in _rounds(shape, hops):
            for rank, (source, target) in round_of_hops:
                for index in shape.stages[rank]:
                    value = Value("kv", chunk, index)
                    lanes.put(source, "main", send(value, target, lanes.tokens(value)))
            for rank, (source, target) in round_of_hops:
                for index in shape.stages[rank]:
                    value = Value("kv", chunk, index)
                    lanes.put(target, "main", recv(value, source, lanes.tokens(value)))
    _final(shape, lanes, "main", "main", "main")


def _enter_stage(chunk: int, rank: int, stage: range, lanes: _LaneBuilder) -> None:
    if rank == 0:
        lanes.put(rank, "main", embed(chunk))
    else:
        lanes.transfer(Value("hidden", chunk, stage.start), (rank - 1, rank), "main", "main")


def _rounds(shape: Shape, hops: Hops) -> Iterator[list[tuple[int, Hop]]]:
    """For each k, the k-th hop of every owner's blocks as (owner, hop)."""
    by_owner = [hops(rank, shape.world_size) for rank in range(shape.world_size)]
    for number in range(shape.world_size - 1):
        yield [(rank, by_owner[rank][number]) for rank in range(shape.world_size)]


SCHEDULES: dict[Schedule, Callable[[Shape, Hops, _LaneBuilder], None]] = {
    "pipelined": _pipelined,
    "lockstep": _lockstep,
    "batched": _batched,
}

"""Schedules: the rules that lay ops on lanes.

`lockstep`   one lane a rank; every rank joins every layer's sync before anyone goes on.
`pipelined`  compute, hidden states and KV on lanes of their own; other ranks' KV is first needed at decode,
             so its sync never stands in the way of prefill.
`batched`    one lane a rank; a whole stage is computed, then all its layers are synced with everyone sending
             first: the rule that hangs when a send waits for its recv. Kept as an exhibit; `verify` refutes
             it.
"""

from collections.abc import Callable, Iterator

from dinfer.config import Schedule, SyncStrategy
from dinfer.plan.ops import FINAL, Op, PlanError, Value, embed, layer, norm, recv, send
from dinfer.plan.partition import Shape
from dinfer.plan.plan import Lane, Plan

Hop = tuple[int, int]
"""(source rank, destination rank)"""


def pairwise(owner: int, world_size: int) -> list[Hop]:
    """The owner sends to each other rank itself, beginning with its right-hand neighbour.

    Each starting with another peer keeps owners that sync at the same time off the same link.
    """
    return [(owner, (owner + step) % world_size) for step in range(1, world_size)]


def ring(owner: int, world_size: int) -> list[Hop]:
    """Each rank passes the block to its right-hand neighbour, until all have it."""
    return [((owner + step - 1) % world_size, (owner + step) % world_size) for step in range(1, world_size)]


STRATEGIES: dict[SyncStrategy, Callable[[int, int], list[Hop]]] = {"pairwise": pairwise, "ring": ring}

Hops = Callable[[int, int], list[Hop]]

Block = tuple[int, int]
"""(chunk, layer)"""


def build(shape: Shape, schedule: Schedule, sync_strategy: SyncStrategy) -> Plan:
    """The plan that `schedule` and `sync_strategy` make of `shape`. Raises PlanError for an unknown name."""
    for given, known in ((schedule, SCHEDULES), (sync_strategy, STRATEGIES)):
        if given not in known:
            raise PlanError(f"{given!r} is not one of {', '.join(known)}.")
    board = _LaneBuilder(shape)
    SCHEDULES[schedule](shape, STRATEGIES[sync_strategy], board)
    return Plan(shape, schedule, sync_strategy, board.lanes())


def compute_order(shape: Shape) -> list[Block]:
    """All blocks in the order in which a pipeline computes them if every layer takes equally long.

    It extends the order of the data flow, so lanes that carry blocks in this order can never wait for one
    another in a circle.
    """
    ended: dict[Block, int] = {}
    free = [0] * shape.world_size
    for chunk in range(len(shape.chunks)):
        for index, rank in enumerate(shape.owners):
            free[rank] = ended[chunk, index] = max(free[rank], ended.get((chunk, index - 1), 0)) + 1
    return sorted(ended, key=lambda block: (ended[block], block))


class _LaneBuilder:
    """Lanes being filled. A lane appears with its first op."""

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

    def lanes(self) -> tuple[tuple[Lane, ...], ...]:
        return tuple(tuple(Lane(name, tuple(ops)) for name, ops in rank.items()) for rank in self._lanes)


def _final(shape: Shape, board: _LaneBuilder, compute: str, out: str, into: str) -> None:
    """The last rank norms the last token's hidden state and gives it to all: each takes the first token."""
    last = shape.world_size - 1
    board.put(last, compute, norm(len(shape.chunks) - 1, shape.layers))
    for peer in range(last):
        board.transfer(FINAL, (last, peer), out, into)


def _pipelined(shape: Shape, hops: Hops, board: _LaneBuilder) -> None:
    for rank, stage in enumerate(shape.stages):
        for chunk in range(len(shape.chunks)):
            if rank == 0:
                board.put(rank, "compute", embed(chunk))
            else:
                entering = Value("hidden", chunk, stage.start)
                board.transfer(entering, (rank - 1, rank), "hidden-out", "hidden-in")
            for index in stage:
                board.put(rank, "compute", layer(chunk, index))
    _final(shape, board, "compute", "hidden-out", "hidden-in")
    for chunk, index in compute_order(shape):
        for source, target in hops(shape.owners[index], shape.world_size):
            board.transfer(Value("kv", chunk, index), (source, target), f"kv-out:{target}", f"kv-in:{source}")


def _lockstep(shape: Shape, hops: Hops, board: _LaneBuilder) -> None:
    for chunk in range(len(shape.chunks)):
        for rank, stage in enumerate(shape.stages):
            _enter_stage(chunk, rank, stage, board)
            for index in stage:
                board.put(rank, "main", layer(chunk, index))
                for hop in hops(rank, shape.world_size):
                    board.transfer(Value("kv", chunk, index), hop, "main", "main")
    _final(shape, board, "main", "main", "main")


def _batched(shape: Shape, hops: Hops, board: _LaneBuilder) -> None:
    for chunk in range(len(shape.chunks)):
        for rank, stage in enumerate(shape.stages):
            _enter_stage(chunk, rank, stage, board)
            for index in stage:
                board.put(rank, "main", layer(chunk, index))
        for round_of_hops in _rounds(shape, hops):
            for rank, (source, target) in round_of_hops:
                for index in shape.stages[rank]:
                    value = Value("kv", chunk, index)
                    board.put(source, "main", send(value, target, board.tokens(value)))
            for rank, (source, target) in round_of_hops:
                for index in shape.stages[rank]:
                    value = Value("kv", chunk, index)
                    board.put(target, "main", recv(value, source, board.tokens(value)))
    _final(shape, board, "main", "main", "main")


def _enter_stage(chunk: int, rank: int, stage: range, board: _LaneBuilder) -> None:
    if rank == 0:
        board.put(rank, "main", embed(chunk))
    else:
        board.transfer(Value("hidden", chunk, stage.start), (rank - 1, rank), "main", "main")


def _rounds(shape: Shape, hops: Hops) -> Iterator[list[tuple[int, Hop]]]:
    """The k-th hop of every owner's blocks, for each k: (owner, hop)."""
    by_owner = [hops(rank, shape.world_size) for rank in range(shape.world_size)]
    for number in range(shape.world_size - 1):
        yield [(rank, by_owner[rank][number]) for rank in range(shape.world_size)]


SCHEDULES: dict[Schedule, Callable[[Shape, Hops, _LaneBuilder], None]] = {
    "pipelined": _pipelined,
    "lockstep": _lockstep,
    "batched": _batched,
}

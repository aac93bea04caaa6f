"""The token game, played naively: what verify and Cuts are compared with. Not a test.

It shares no code with `dinfer.plan.graph`: lanes advance in random order, values are a set per rank, buffered
messages are queues.
"""

from __future__ import annotations

from collections import defaultdict, deque
from random import Random

from dinfer.plan.cut import Cut
from dinfer.plan.ops import FINAL, Op, Value
from dinfer.plan.plan import OpPlace, Plan

Lane = tuple[int, int]
"""(rank, lane)"""


class Broken(Exception):
    """The plan did what no plan may do."""


class Game:
    """One run of a plan, from nothing or from a consistent cut. Positions never go past `limits`."""

    def __init__(
        self,
        plan: Plan,
        *,
        rendezvous: bool,
        seed: int,
        positions: Cut | None = None,
        limits: Cut | None = None,
    ) -> None:
        self.plan, self.rendezvous, self.random = plan, rendezvous, Random(seed)
        self.limits = limits or tuple(tuple(len(lane.ops) for lane in rank) for rank in plan.lanes)
        start = positions or tuple(tuple(0 for _ in rank) for rank in plan.lanes)
        self.at = {(r, k): at for r, rank in enumerate(start) for k, at in enumerate(rank)}
        self.held: list[set[Value]] = [set() for _ in plan.lanes]
        self.queues: dict[tuple[str, int, int], deque[Op]] = defaultdict(deque)
        for rank, lane in self.at:
            for op in plan.lanes[rank][lane].ops[: self.at[rank, lane]]:
                self.held[rank].update(op.makes())

    def play(self, steps: int | None = None) -> None:
        """Until nothing moves, or for some steps."""
        while steps is None or steps > 0:
            movable = [lane for lane in self.at if self.can_move(lane)]
            if not movable:
                return
            self.move(self.random.choice(movable))
            steps = None if steps is None else steps - 1

    @property
    def positions(self) -> Cut:
        return tuple(tuple(self.at[r, k] for k in range(len(rank))) for r, rank in enumerate(self.plan.lanes))

    def head(self, lane: Lane) -> Op | None:
        rank, number = lane
        at = self.at[lane]
        return self.plan.lanes[rank][number].ops[at] if at < self.limits[rank][number] else None

    def is_ready(self, lane: Lane) -> bool:
        """Whether the op at the head of `lane` can begin."""
        op = self.head(lane)
        return op is not None and self.held[lane[0]].issuperset(op.needs())

    def can_move(self, lane: Lane) -> bool:
        op = self.head(lane)
        if op is None or not self.is_ready(lane):
            return False
        if op.kind == "recv":
            return bool(self.queues[channel(lane[0], op)]) or self.partner(lane) is not None
        return op.kind != "send" or not self.rendezvous or self.partner(lane) is not None

    def partner(self, lane: Lane) -> Lane | None:
        """The lane that stands at the other end of the transfer at the head of `lane`."""
        op = self.head(lane)
        assert op is not None
        if not self.rendezvous:
            return None
        other = "recv" if op.kind == "send" else "send"
        for there in self.at:
            head = self.head(there)
            if there[0] != op.peer or head is None or head.kind != other or not self.is_ready(there):
                continue
            if channel(there[0], head) == channel(lane[0], op):
                return there
        return None

    def move(self, lane: Lane) -> None:
        op = self.head(lane)
        assert op is not None
        if not op.is_transfer:
            self.end(lane)
        elif self.rendezvous:
            there = self.partner(lane)
            assert there is not None
            other = self.head(there)
            assert other is not None
            check_same(op, other)
            self.end(lane)
            self.end(there)
        elif op.kind == "send":
            self.queues[channel(lane[0], op)].append(op)
            self.end(lane)
        else:
            check_same(op, self.queues[channel(lane[0], op)].popleft())
            self.end(lane)

    def end(self, lane: Lane) -> None:
        op = self.head(lane)
        assert op is not None
        for value in op.makes():
            if value in self.held[lane[0]]:
                raise Broken(f"{value} twice on rank {lane[0]}")
            self.held[lane[0]].add(value)
        self.at[lane] += 1

    def is_complete(self) -> bool:
        """Whether all ops ended, all messages arrived and every rank holds all blocks and the final state."""
        shape = self.plan.shape
        wanted = {Value("kv", c, n) for c in range(len(shape.chunks)) for n in range(shape.layers)} | {FINAL}
        return (
            self.positions == self.limits
            and not any(self.queues.values())
            and all(held >= wanted for held in self.held)
        )

    def begun(self) -> set[OpPlace]:
        """Some of the ops that may have begun now and not ended."""
        ready = [lane for lane in self.at if self.is_ready(lane)]
        return {OpPlace(*lane, self.at[lane]) for lane in ready if self.random.random() < 0.6}


def finishes(plan: Plan, *, rendezvous: bool, seed: int) -> bool:
    """Whether a run of the plan does all that it should and nothing else."""
    if not all(exists(plan, place.rank, op) for place, op in plan.places()) or shares_a_channel(plan):
        return False
    game = Game(plan, rendezvous=rendezvous, seed=seed)
    try:
        game.play()
    except Broken:
        return False
    return game.is_complete()


def channel(rank: int, op: Op) -> tuple[str, int, int]:
    ends = (rank, op.peer) if op.kind == "send" else (op.peer, rank)
    return ("kv" if op.what == "kv" else "hidden", *ends)


def check_same(one: Op, other: Op) -> None:
    if (one.value, one.tokens) != (other.value, other.tokens):
        raise Broken(f"`{one}` meets `{other}`")


def exists(plan: Plan, rank: int, op: Op) -> bool:
    """Whether the op speaks of a chunk, layer, peer and size that the shape has."""
    shape = plan.shape
    sizes = [len(chunk) for chunk in shape.chunks]
    if op.is_transfer:
        if op.peer == rank or op.peer not in range(shape.world_size):
            return False
        if op.what == "final":
            return op.tokens == 1
    if op.chunk not in range(len(sizes)):
        return False
    if op.kind == "embed":
        return True
    if op.kind == "norm":
        return (op.chunk, op.layer) == (len(sizes) - 1, shape.layers)
    if op.kind == "layer":
        return op.layer in range(shape.layers)
    last = shape.layers if op.what == "hidden" else shape.layers - 1
    return 0 <= op.layer <= last and op.tokens == sizes[op.chunk]


def shares_a_channel(plan: Plan) -> bool:
    """Whether two lanes of a rank send, or receive, on one channel."""
    users: dict[tuple[str, tuple[str, int, int]], set[Lane]] = defaultdict(set)
    for place, op in plan.places():
        if op.is_transfer:
            users[op.kind, channel(place.rank, op)].add((place.rank, place.lane))
    return any(len(lanes) > 1 for lanes in users.values())


def waits(game: Game) -> dict[Lane, set[Lane]]:
    """For each lane of a game in which nothing moves, the lanes that it waits for.

    For plans whose only mistakes are of order: each value has one maker, each channel one lane at each end.
    """
    found: dict[Lane, set[Lane]] = {}
    for lane in game.at:
        op = game.head(lane)
        if op is not None:
            missing = set(op.needs()) - game.held[lane[0]]
            found[lane] = _makers(game, lane[0], missing) if missing else {_other_end(game, lane[0], op)}
    return found


def _makers(game: Game, rank: int, missing: set[Value]) -> set[Lane]:
    lanes = game.plan.lanes[rank]
    return {
        (rank, k) for k, lane in enumerate(lanes) if any(missing.intersection(op.makes()) for op in lane.ops)
    }


def _other_end(game: Game, rank: int, op: Op) -> Lane:
    kind = "recv" if op.kind == "send" else "send"
    for number, lane in enumerate(game.plan.lanes[op.peer]):
        if any(o.kind == kind and channel(op.peer, o) == channel(rank, op) for o in lane.ops):
            return op.peer, number
    raise AssertionError(f"{op} has no other end")

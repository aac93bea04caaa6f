"""Random faults, with what each must do: for proofs that every one of them is found. Not a test.

`random_setup` draws how a prompt is run, `random_fault` what to break in such a run. Both draw from the generator they
are given and from nothing else.
"""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

from dinfer.plan.faults import KINDS, FaultPlace
from dinfer.plan.partition import Shape
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import STRATEGIES
from dinfer.run.run import Run

WORLD_SIZES = (2, 3, 4)
DTYPES = ("float32", "bfloat16")
BLOCK_KINDS = tuple(kind for kind in KINDS if kind != "repeat_row")


class Setup(NamedTuple):
    """How a prompt is run; `parameters` are those of `session.prefill`."""

    world_size: int
    dtype: str
    parameters: dict[str, Any]


class Injection(NamedTuple):
    """`arguments`: of `run.inject`. Of what it breaks: the block, K, V or both (None), and as far as it is one row or
    one value, head, token and dim.

    `ranks`: those that hold wrong bytes of the block, or rows too many; `hop`: on the wire, the hop on which they went
    wrong. `is_shared`: all ranks agree, and with what was made: only a reference tells. `changes_others`: blocks of
    later chunks and layers are computed from the wrong bytes, and so may differ from a clean run on all ranks.
    """

    arguments: dict[str, Any]
    kind: str
    where: FaultPlace
    rank: int
    chunk: int
    layer: int
    tensor: str | None
    head: int | None
    token: int | None
    dim: int | None
    ranks: frozenset[int]
    hop: tuple[int, int] | None
    is_shared: bool
    changes_others: bool


def random_setup(random: Random, layers: int = 4) -> Setup:
    """For a model of that many layers, 4 at least: more chunks than one, the last one mostly shorter."""
    chunk_size = random.randint(2, 6)
    parameters = {
        "chunk_size": chunk_size,
        "sync_strategy": random.choice(("pairwise", "ring")),
        "schedule": random.choice(("pipelined", "lockstep")),
        "max_new_tokens": 3,
    }
    world_size = random.choice([n for n in WORLD_SIZES if n <= layers])
    return Setup(world_size, random.choice(DTYPES), parameters)


def random_prompt(random: Random, vocabulary: int = 128) -> list[int]:
    return [random.randrange(vocabulary) for _ in range(random.randint(7, 14))]


def random_fault(
    random: Random,
    run: Run,
    kinds: tuple[str, ...] = BLOCK_KINDS,
    wheres: tuple[FaultPlace, ...] = ("memory", "wire", "compute"),
) -> Injection:
    """One that this run takes now: standing at its start, or, in memory only, at its end."""
    at_end = run.standing().state == "done"
    plan, spec = run.plan, run.job.spec
    places = [
        (kind, where)
        for kind in kinds
        for where in KINDS[kind].wheres
        if where in wheres and (where == "memory" or not at_end) and (kind != "head_shift" or spec.kv_heads > 1)
    ]  # fmt: skip
    kind, where = random.choice(places)
    chunk, layer = _block(random, kind, plan.shape)
    owner = plan.shape.owners[layer]
    others = [rank for rank in range(plan.world_size) if rank != owner]
    rank = owner if where == "compute" else random.choice(others + [owner] * (where == "memory"))
    details = _details(random, kind, plan.shape.chunks[chunk], run)
    spreads = not at_end and kind != "append_twice"
    hit = _passed_on(plan, layer, rank) if spreads else frozenset({rank})
    return Injection(
        arguments={"kind": kind, "where": where, "rank": rank, "chunk": chunk, "layer": layer, **details},
        kind=kind, where=where, rank=rank, chunk=chunk, layer=layer,
        tensor=details.get("tensor"), head=details.get("head"), token=details.get("token"), dim=details.get("dim"),
        ranks=hit,
        hop=next((hop for hop in _hops(plan, layer) if hop[1] == rank), None) if where == "wire" else None,
        is_shared=where == "compute",
        changes_others=rank == owner and spreads,
    )  # fmt: skip


def _block(random: Random, kind: str, shape: Shape) -> tuple[int, int]:
    chunks = [
        number
        for number, rows in enumerate(shape.chunks)
        if not (kind == "stale" and number == 0) and not (kind == "permute" and len(rows) == 1)
    ]
    return random.choice(chunks), random.randrange(shape.layers)


def _details(random: Random, kind: str, rows: range, run: Run) -> dict[str, Any]:
    takes, spec = KINDS[kind].details, run.job.spec
    both = [] if "head" in takes else [None]
    bits = 32 if (run.config.dtype if run.config.dtype != "auto" else spec.dtype) == "float32" else 16
    drawn: dict[str, Any] = {
        "tensor": random.choice(["K", "V", *both]),
        "head": random.randrange(spec.kv_heads),
        "token": random.choice(rows),
        "dim": random.randrange(spec.head_dim),
        "bit": random.randrange(bits),
        "seed": random.randrange(1000),
    }
    return {name: value for name, value in drawn.items() if name in takes and value is not None}


def _hops(plan: Plan, layer: int) -> list[tuple[int, int]]:
    return STRATEGIES[plan.sync_strategy](plan.shape.owners[layer], plan.world_size)  # type: ignore[index]


def _passed_on(plan: Plan, layer: int, rank: int) -> frozenset[int]:
    """The rank, and all that get the layer's blocks from it."""
    ranks = {rank}
    for source, target in _hops(plan, layer):
        ranks |= {target} if source in ranks else set()
    return frozenset(ranks)

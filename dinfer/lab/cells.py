"""The cells of the lab: every fault at every place of every plan where it can strike, and the few that are run."""

import random
from collections.abc import Hashable, Iterator, Sequence
from functools import cache
from itertools import combinations, product
from typing import TypeVar

from dinfer.lab.expected import RULES, Cell, target
from dinfer.plan.graph import Graph
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build

N = 3

LAYERS, TOKENS, CHUNK_SIZE = 6, 16, 4
"""of the demo model and of the lab's prompt"""

STRATEGIES = ("pairwise", "ring")

SCHEDULES = ("pipelined", "lockstep")


@cache
def graph_of(strategy: str, schedule: str) -> Graph:
    """The graph of the lab's runs with that plan."""
    shape = partition(layers=LAYERS, tokens=TOKENS, world_size=N, chunk_size=CHUNK_SIZE)
    return Graph(build(shape, schedule, strategy))  # type: ignore[arg-type]


@cache
def possible_cells() -> tuple[Cell, ...]:
    chunks = range(-(-TOKENS // CHUNK_SIZE))
    every = map(Cell._make, product(RULES, range(N), range(LAYERS), chunks, STRATEGIES, SCHEDULES))
    return tuple(cell for cell in every if target(graph_of(cell.strategy, cell.schedule), cell))


def cells_of(seed: int, sample: int | None = None) -> list[Cell]:
    """The whole matrix, in which every two values that can go together share a cell. `sample`: only that many cells,
    spread over the faults."""
    cells = covering_array(possible_cells(), seed)
    return cells if sample is None else spread(cells, sample)


# -- covering arrays: few cells with every pair of values that can go together

CellT = TypeVar("CellT", bound=Sequence[Hashable])

FactorPair = tuple[int, Hashable, int, Hashable]
"""two factors, by index, each followed by its value"""


def pairs_of(cell: Sequence[Hashable]) -> Iterator[FactorPair]:
    for (i, one), (j, other) in combinations(enumerate(cell), 2):
        yield i, one, j, other


def covering_array(possible: Sequence[CellT], seed: int) -> list[CellT]:
    """Cells out of `possible` that cover every pair of values in any of these. Greedy: each cell is one that covers the
    most pairs not covered so far. The seed decides ties and the order."""
    numbers: dict[FactorPair, int] = {}
    for cell in possible:
        for pair in pairs_of(cell):
            numbers.setdefault(pair, len(numbers))
    shuffled = list(possible)
    random.Random(seed).shuffle(shuffled)
    masks = [sum(1 << numbers[pair] for pair in pairs_of(cell)) for cell in shuffled]
    missing = (1 << len(numbers)) - 1
    chosen = list[CellT]()
    while missing:
        best = max(range(len(masks)), key=lambda n: (masks[n] & missing).bit_count())
        chosen.append(shuffled[best])
        missing &= ~masks[best]
    random.Random(seed).shuffle(chosen)
    return chosen


def spread(cells: Sequence[CellT], count: int) -> list[CellT]:
    """`count` cells, spread evenly over the values of the first factor: the first cell of each value, then the second
    …"""
    seen: dict[Hashable, int] = {}
    turns = []
    for place, cell in enumerate(cells):
        turns.append((seen.get(cell[0], 0), place))
        seen[cell[0]] = seen.get(cell[0], 0) + 1
    return [cells[place] for _, place in sorted(turns)[:count]]

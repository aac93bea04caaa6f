"""The cells of the lab: every fault at every place of every plan where it can strike, and the few that are run."""

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cache
from itertools import combinations, product
from typing import TypeVar

from dinfer.lab.faults import RULES, Cell, target
from dinfer.plan.graph import Graph
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build

N, LAYERS, TOKENS, CHUNK_SIZE = 3, 6, 16, 4
"""ranks; layers of the demo model; tokens of the lab's prompt, and of a chunk"""

STRATEGIES, SCHEDULES = ("pairwise", "ring"), ("pipelined", "lockstep")


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
    spread over the faults: the first cell of each, then the second …"""
    cells = covering_array(possible_cells(), seed)
    seen = Counter[str]()
    turns = []
    for place, cell in enumerate(cells):
        turns.append((seen[cell.fault], place))
        seen[cell.fault] += 1
    return cells if sample is None else [cells[place] for _, place in sorted(turns)[:sample]]


CellT = TypeVar("CellT", bound=Sequence[Hashable])


def covering_array(possible: Sequence[CellT], seed: int) -> list[CellT]:
    """Cells out of `possible` that cover every pair of values in any of these: few cells, in which any two values that
    can go together do. Greedy: each cell is one that covers the most pairs not covered so far. The seed decides ties
    and the order."""
    numbers: dict[Hashable, int] = {}  # of pairs: of two factors, by index, each with its value
    for cell in possible:
        for pair in combinations(enumerate(cell), 2):
            numbers.setdefault(pair, len(numbers))
    shuffled = list(possible)
    random.Random(seed).shuffle(shuffled)
    masks = [sum(1 << numbers[pair] for pair in combinations(enumerate(cell), 2)) for cell in shuffled]
    missing = (1 << len(numbers)) - 1
    chosen = list[CellT]()
    while missing:
        best = max(range(len(masks)), key=lambda n: (masks[n] & missing).bit_count())
        chosen.append(shuffled[best])
        missing &= ~masks[best]
    random.Random(seed).shuffle(chosen)
    return chosen

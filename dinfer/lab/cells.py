"""Which trials there are: every fault at every place of every plan where it can strike, and the few that are run."""

from functools import cache
from itertools import product

from dinfer.lab.covering import covering_array, spread
from dinfer.lab.expected import RULES, Cell, target
from dinfer.plan.graph import Graph
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build

N = 3

LAYERS, TOKENS, CHUNK_SIZE = 6, 16, 4
"""of the demo model, and of the lab's prompt"""

STRATEGIES = ("pairwise", "ring")

SCHEDULES = ("pipelined", "lockstep")


@cache
def graph_of(strategy: str, schedule: str) -> Graph:
    """That of the lab's runs."""
    shape = partition(layers=LAYERS, tokens=TOKENS, world_size=N, chunk_size=CHUNK_SIZE)
    return Graph(build(shape, schedule, strategy))  # type: ignore[arg-type]


@cache
def possible_cells() -> tuple[Cell, ...]:
    chunks = range(-(-TOKENS // CHUNK_SIZE))
    every = map(Cell._make, product(RULES, range(N), range(LAYERS), chunks, STRATEGIES, SCHEDULES))
    return tuple(cell for cell in every if target(graph_of(cell.strategy, cell.schedule), cell))


def cells_of(seed: int, sample: int | None = None) -> list[Cell]:
    """The whole matrix: every two values that can go together do in one of its cells. `sample`: so many of them, spread
    over the faults."""
    cells = covering_array(possible_cells(), seed)
    return cells if sample is None else spread(cells, sample)

"""Covering arrays: few cells in which every pair of values that can go together does. Pure; knows no faults."""

import random
from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations
from typing import TypeVar

CellT = TypeVar("CellT", bound=Sequence[Hashable])

FactorPair = tuple[int, Hashable, int, Hashable]
"""two factors, by place, and a value of each"""


def pairs_of(cell: Sequence[Hashable]) -> Iterator[FactorPair]:
    for (i, one), (j, other) in combinations(enumerate(cell), 2):
        yield i, one, j, other


def covering_array(possible: Sequence[CellT], seed: int) -> list[CellT]:
    """Cells out of `possible` that hold every pair of values that any of them holds; greedy: each next one is of those
    that hold the most pairs which none before it does. The seed decides among equals, and the order of all."""
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
    """That many of them, evenly over the values of the first factor: each value's first, then each one's second, …"""
    seen: dict[Hashable, int] = {}
    turns = []
    for place, cell in enumerate(cells):
        turns.append((seen.get(cell[0], 0), place))
        seen[cell[0]] = seen.get(cell[0], 0) + 1
    return [cells[place] for _, place in sorted(turns)[:count]]

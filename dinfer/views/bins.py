"""Bins: a map of any size in as few cells as there is room for, and as few bytes as it takes. Pure: numpy in and out.

A bin is a few consecutive layers × chunks × ranks that share a cell. It has every mark that any of its blocks has, and
of their states the most urgent: a block that is computed or sent now is seen among any number of others, and a bin is
"on every rank" only if all of it is. map.js does the same for the live map.
"""

from typing import NamedTuple

import numpy as np

from dinfer.views.cells import BASE, COMPUTING, EVERYWHERE, HERE, IN_FLIGHT, NOT_YET, CellStates

URGENT = (EVERYWHERE, NOT_YET, HERE, IN_FLIGHT, COMPUTING)
"""states, the most urgent last"""

LEAST, PART, PARTS = 4, 2, 8
"""pixels of the smallest cell and of the smallest part of one, and its parts: as in map.js"""


class BinSize(NamedTuple):
    """How many layers, chunks and ranks share a cell."""

    layers: int = 1
    chunks: int = 1
    ranks: int = 1

    @property
    def text(self) -> str:
        """For a caption, for example `each cell is 10 chunks × 2 layers`; "" if each is one block."""
        many = [f"{self.chunks} chunks"] * (self.chunks > 1) + [f"{self.layers} layers"] * (self.layers > 1)
        parts = f"each part of a cell is {self.ranks} ranks" if self.ranks > 1 else ""
        return ", ".join(filter(None, (f"each cell is {' × '.join(many)}" if many else "", parts)))


def fitting(shape: tuple[int, ...], wide: int, high: int) -> BinSize:
    """The smallest bins with which a map of [layers, chunks, ranks] has room in so many pixels, its cells' parts being
    at least PART wide."""
    layers, chunks, ranks = shape
    per_chunk = per_cell(chunks, wide // max(LEAST, PART * min(ranks, PARTS)))
    across = wide // -(-chunks // per_chunk)
    return BinSize(per_cell(layers, high // LEAST), per_chunk, per_cell(ranks, across // PART))


def per_cell(count: int, room: int) -> int:
    """How many of `count` share a cell where there is room for `room` cells."""
    return max(1, -(-count // max(1, room)))


def binned(states: CellStates, size: BinSize) -> CellStates:
    """The states of bins, with their marks: [layers, chunks, ranks], each divided by `size` and rounded up."""
    urgency = np.zeros(BASE + 1, np.uint8)
    urgency[list(URGENT)] = np.arange(len(URGENT))
    most, marks = urgency[states & BASE], states & ~np.uint8(BASE)
    for axis, per in enumerate(size):
        firsts = np.arange(0, states.shape[axis], per)
        most = np.maximum.reduceat(most, firsts, axis=axis)
        marks = np.bitwise_or.reduceat(marks, firsts, axis=axis)
    found: CellStates = np.array(URGENT, np.uint8)[most] | marks
    return found


def packed(states: CellStates) -> bytes:
    """The states as runs of equal ones, rank by rank and layer by layer along the chunks: the length of each run as
    four bytes, the lowest first, then the byte of each run.

    A rank gets the blocks of a layer in the order of chunks, so that each row is a handful of runs however many chunks
    there are.
    """
    flat = states.transpose(2, 0, 1).ravel()
    firsts = np.flatnonzero(np.diff(flat, prepend=~flat[:1]))
    return np.diff(firsts, append=flat.size).astype("<u4").tobytes() + flat[firsts].tobytes()

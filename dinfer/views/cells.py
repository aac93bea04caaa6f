"""Cells: what each rank holds of each block, as one array of bytes. Pure: plan and stands in, numpy out.

A cell is one block (layer, chunk) as one rank sees it:

0 NOT_YET     its owner has not computed it.
1 COMPUTING   this rank's op that computes it has begun.
2 HERE        this rank holds it (computed or received), but another rank does not yet.
3 IN_FLIGHT   it is computed, and this rank still waits for it.
4 EVERYWHERE  every rank holds it.

So the parts of a cell tell who holds a block (2, 4) and who waits for it (3), and a cell is of one colour before its
block is computed and once it is everywhere.

Two marks may be on it besides: DIFFERS, where the rank holds the block and its bytes are known to be wrong, and ARMED,
where a fault is to strike, or has struck.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan
from dinfer.run.state import Mark
from dinfer.verdict.where import RankStand

NOT_YET, COMPUTING, HERE, IN_FLIGHT, EVERYWHERE = range(5)

STATES = ("not yet", "computing", "here, not everywhere", "in flight to here", "on every rank")

DIFFERS, ARMED = 8, 16

BASE = 7
"""the bits of a cell that are its state without marks"""

MARKS = ("differs or corrupt", "a fault is armed")

CellStates = NDArray[np.uint8]
"""[layers, chunks, ranks]"""

_NEVER = np.iinfo(np.int32).max


class CellMap:
    """Which op of which lane brings each block to each rank, found once a plan."""

    def __init__(self, plan: Plan) -> None:
        shape = plan.shape
        self.shape = (shape.layers, len(shape.chunks), plan.world_size)
        self._lane = np.zeros(self.shape, np.int32)
        self._index = np.full(self.shape, _NEVER, np.int32)
        self._computes = np.zeros(self.shape, bool)
        number = 0
        for rank, lanes in enumerate(plan.lanes):
            for lane in lanes:
                self._note(rank, number, lane.ops)
                number += 1

    def _note(self, rank: int, lane: int, ops: Sequence[Op]) -> None:
        for index, op in enumerate(ops):
            if op.kind == "layer" or (op.kind == "recv" and op.what == "kv"):
                at = (op.layer, op.chunk, rank)
                self._lane[at], self._index[at], self._computes[at] = lane, index, op.kind == "layer"

    def states(self, stands: Sequence[RankStand]) -> CellStates:
        """The state of every cell."""
        positions = np.array([n for stand in stands for n in stand.positions], np.int32)[self._lane]
        started = np.array([begun for stand in stands for begun in stand.started], bool)[self._lane]
        held = positions > self._index
        computing = self._computes & started & (positions == self._index)
        states = np.where(held.any(axis=2, keepdims=True), IN_FLIGHT, NOT_YET).repeat(self.shape[2], axis=2)
        states[computing] = COMPUTING
        states[held] = HERE
        states[held.all(axis=2)] = EVERYWHERE
        return states.astype(np.uint8)


def marked(states: CellStates, marks: Iterable[Mark]) -> CellStates:
    """The same with what is known of single blocks."""
    found = states.copy()
    for mark in marks:
        at = (mark.layer, mark.chunk, mark.rank)
        if mark.kind == "armed":
            found[at] |= ARMED
        elif states[at] in (HERE, EVERYWHERE):
            found[at] |= DIFFERS
    return found


def cut_line(states: CellStates) -> list[int]:
    """For each chunk, how many of its layers have been computed.

    A chunk's layer needs its layer before and the same layer of all chunks before: what has been computed lies above
    these depths, which never grow from one chunk to the next: a staircase.
    """
    computed = (states != NOT_YET) & (states != COMPUTING)
    depths: list[int] = computed.any(axis=2).sum(axis=0).tolist()
    return depths

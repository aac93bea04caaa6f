"""Cells: what each rank holds of each block, as an array of bytes. Pure: from a plan and where ranks stand.

A cell is a block (layer, chunk) as one rank sees it:

0 NOT_YET its owner has not computed it. 1 COMPUTING this rank is computing it. 2 HERE this rank holds it (computed or
received), but some other rank does not yet. 3 IN_FLIGHT it is computed, and this rank is still waiting for it. 4
EVERYWHERE every rank holds it.

So a cell shows which ranks hold a block (2, 4) and which wait for it (3); it has one colour before its block is
computed and once all ranks hold it.

Three marks are added: DIFFERS, if the rank holds the block and its bytes are known to be wrong; NONFINITE, if it holds
the block and NaN or Inf were computed in it, or in the hidden state after it; and ARMED, if a fault will strike there,
or has struck.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from dinfer.plan.plan import Plan
from dinfer.run.state import Mark
from dinfer.verdict.where import RankStand

NOT_YET, COMPUTING, HERE, IN_FLIGHT, EVERYWHERE = range(5)

STATES = ("not yet", "computing", "here, not everywhere", "in flight to here", "on every rank")

DIFFERS, ARMED, NONFINITE = 8, 16, 32

BASE = 7
"""mask for the state of a cell without its marks"""

MARKS = ("differs or corrupt", "a fault is armed", "NaN or Inf")
"""in the order of their bits"""

CellStates = NDArray[np.uint8]
"""[layers, chunks, ranks]"""

_NEVER = np.iinfo(np.int32).max


class CellMap:
    """For a plan: which op of which lane brings each block to each rank."""

    def __init__(self, plan: Plan) -> None:
        shape = plan.shape
        self.shape = (shape.layers, len(shape.chunks), plan.world_size)
        self._lane = np.zeros(self.shape, np.int32)
        self._index = np.full(self.shape, _NEVER, np.int32)
        self._computes = np.zeros(self.shape, bool)
        number = 0
        for rank, lanes in enumerate(plan.lanes):
            for lane in lanes:
                for index, op in enumerate(lane.ops):
                    if op.kind == "layer" or (op.kind == "recv" and op.what == "kv"):
                        at = (op.layer, op.chunk, rank)
                        self._lane[at], self._index[at] = number, index
                        self._computes[at] = op.kind == "layer"
                number += 1

    def states(self, stands: Sequence[RankStand]) -> CellStates:
        """The state of every cell, [layers, chunks, ranks]. Without stands, which a rank that was started again has not
        told, that of a run that has not begun."""
        if not stands:
            return held_states(np.zeros(self.shape, bool))
        positions = np.array([n for stand in stands for n in stand.positions], np.int32)[self._lane]
        started = np.array([begun for stand in stands for begun in stand.started], bool)[self._lane]
        states = held_states(positions > self._index)
        states[self._computes & started & (positions == self._index)] = COMPUTING
        return states


def held_states(held: NDArray[np.bool_]) -> CellStates:
    """The states, where nothing is known but whether each rank holds each block, [layers, chunks, ranks]."""
    states = np.where(held.any(axis=2, keepdims=True), IN_FLIGHT, NOT_YET).repeat(held.shape[2], axis=2)
    states[held] = HERE
    states[held.all(axis=2)] = EVERYWHERE
    return states.astype(np.uint8)


def marked(states: CellStates, marks: Iterable[Mark]) -> CellStates:
    """The states with marks on single blocks."""
    found = states.copy()
    for mark in marks:
        at = (mark.layer, mark.chunk, mark.rank)
        if mark.kind == "armed":
            found[at] |= ARMED
        elif mark.kind in ("nonfinite", "nonfinite hidden"):  # whoever holds the block holds them too
            block = states[mark.layer, mark.chunk]
            found[mark.layer, mark.chunk, (block == HERE) | (block == EVERYWHERE)] |= NONFINITE
        elif states[at] in (HERE, EVERYWHERE):
            found[at] |= DIFFERS
    return found


def cut_line(states: CellStates) -> list[int]:
    """For each chunk, the number of its layers that have been computed.

    A layer of a chunk needs the chunk's layer before and the same layer of the chunks before, so these depths never
    grow from one chunk to the next: the cut is a staircase.
    """
    computed = (states != NOT_YET) & (states != COMPUTING)
    depths: list[int] = computed.any(axis=2).sum(axis=0).tolist()
    return depths

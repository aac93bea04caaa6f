"""Timeline: a run's map, ranks and strip at any moment of its trace, as arrays of numpy. Pure.

A trace does not say when a run went back, only that ops were done again: a block is held from the end of the op that
brought it until that op, or one before it on its lane, is ready once more.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from dinfer.trace.events import Event
from dinfer.trace.intervals import Interval, union
from dinfer.trace.moment import times_of
from dinfer.trace.shares import shares
from dinfer.trace.trace import Trace
from dinfer.views.cells import COMPUTING, CellStates, held_states

NEVER = np.iinfo(np.int64).max

PARTS = ("", "compute", "wire", "wait", "bubble", "data")
"""what a strip's bin shows, by its code; "data": a lane waits for its own rank's data"""

StripCodes = NDArray[np.uint8]
"""[rows, bins]"""


class Timeline:
    """A trace, and what can be asked of it at any time. `shape`: layers, chunks and ranks of the map. Times are
    nanoseconds since `trace.began`; `span`: of the last event's end; `paused`: how many the trace is without."""

    def __init__(self, trace: Trace, shape: tuple[int, int, int], paused: int = 0) -> None:
        self.trace, self.shape, self.paused = trace, shape, paused
        self.began = trace.began
        self.span = max((event.end for event in trace.events), default=self.began) - self.began
        self.lanes = sorted({(event.rank, event.lane) for event in trace.events})
        ended, voids = _ended_ops(trace.events)
        self._ops = np.concatenate([_rows(ended, shape), np.array([voids], np.int64)])
        """of each ended op: rank, cell or −1, whether it computes that cell, met, end, and until when it counts"""

    def states(self, at: int) -> CellStates:
        """The state of every cell, [layers, chunks, ranks], as a map shows it."""
        time = at + self.began
        _, cell, computes, met, end, void = self._ops
        held = np.zeros(self.shape, bool)
        held.reshape(-1)[cell[(cell >= 0) & (end <= time) & (time < void)]] = True
        states = held_states(held)
        states.reshape(-1)[cell[(computes == 1) & (met <= time) & (time < end)]] = COMPUTING
        return states

    def done(self, at: int) -> list[int]:
        """By rank, how many ops have ended and have not been taken back."""
        time = at + self.began
        rank, _, _, _, end, void = self._ops
        found: list[int] = np.bincount(rank[(end <= time) & (time < void)], minlength=self.shape[2]).tolist()
        return found

    def rank_rows(self, begin: int, end: int, bins: int) -> StripCodes:
        """For each rank of the map and each of so many equal bins, the code in PARTS of what most of it went into."""
        by_rank = {share.rank: share for share in shares(self.trace).ranks}
        rows = np.zeros((self.shape[2], bins), np.uint8)
        for rank, share in by_rank.items():
            if rank < len(rows):
                parts = (share.compute, share.wire, share.wait, share.bubble)
                rows[rank] = self._most(parts, (1, 2, 3, 4), begin, end, bins)
        return rows

    def lane_rows(self, lanes: Sequence[tuple[int, str]], begin: int, end: int, bins: int) -> StripCodes:
        """The same for these lanes, (rank, name)."""
        rows = np.zeros((len(lanes), bins), np.uint8)
        for number, lane in enumerate(lanes):
            events = times_of(self.trace, *lane)
            busy = union((event.met, event.end) for event in events)
            wait = union((event.start, event.met) for event in events)
            data = union((event.ready, event.start) for event in events)
            code = 2 if any(event.peer is not None for event in events) else 1
            rows[number] = self._most((busy, wait, data), (code, 3, 5), begin, end, bins)
        return rows

    def _most(
        self, parts: Sequence[Sequence[Interval]], codes: Sequence[int], begin: int, end: int, bins: int
    ) -> StripCodes:
        """Of each bin, the code of the part that takes most of it; 0 where they take less than a hundredth."""
        edges = np.linspace(begin, end, bins + 1) + self.began
        filled = np.stack([np.diff(_covered(part, edges)) for part in parts])
        most: StripCodes = np.array(codes, np.uint8)[filled.argmax(axis=0)]
        most[filled.max(axis=0) * 100 * bins < max(1, end - begin)] = 0
        return most


def _covered(intervals: Sequence[Interval], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of the time up to each edge lies in these intervals, which are in order and do not overlap."""
    if not intervals:
        return np.zeros(len(edges))
    spans = np.array(intervals, np.int64)
    sums = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
    at = np.searchsorted(spans[:, 0], edges)  # so many have begun
    past = np.where(at > 0, np.maximum(0, spans[at - 1, 1] - edges), 0)
    covered: NDArray[np.float64] = sums[at] - past
    return covered


def _ended_ops(events: Sequence[Event]) -> tuple[list[Event], list[int]]:
    """The events of a run's ops that have ended, and until when each counts: NEVER, or when its lane went back before
    it, which is known once an op with its number or a lower one is ready again."""
    ended, voids = list[Event](), list[int]()
    standing: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for event in events:
        number = event.index
        if number is None or not event.end or event.what == "token" or event.kind == "decode":
            continue
        lane = standing.setdefault((event.rank, event.lane), [])
        while lane and lane[-1][0] >= number:
            voids[lane.pop()[1]] = event.ready
        lane.append((number, len(ended)))
        ended.append(event)
        voids.append(NEVER)
    return ended, voids


def _rows(events: Sequence[Event], shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """For each event a row of Timeline._ops, without the last; [5, events]."""

    def column(values: Iterable[int]) -> NDArray[np.int64]:
        return np.fromiter(values, np.int64, len(events))

    layers, chunks, ranks = shape
    rank = column(event.rank for event in events)
    computes = column(event.kind == "layer" for event in events)
    brings = computes | column(event.kind == "recv" and event.what == "kv" for event in events)
    layer = column(-1 if event.layer is None else event.layer for event in events)
    chunk = column(-1 if event.chunk is None else event.chunk for event in events)
    is_inside = (layer >= 0) & (layer < layers) & (chunk >= 0) & (chunk < chunks) & (rank < ranks)
    cell = np.where((brings > 0) & is_inside, (layer * chunks + chunk) * ranks + rank, -1)
    met, end = (column(map(attrgetter(name), events)) for name in ("met", "end"))
    return np.stack([rank, cell, computes, met, end])

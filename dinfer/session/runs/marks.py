"""Marks: what is known of single blocks on single ranks: a fault is armed there, it differs, its bytes have changed."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from dinfer.engine.corruption import Corruption
from dinfer.plan.cut import Cut
from dinfer.plan.plan import Plan
from dinfer.session.kv.difference import Diff
from dinfer.session.kv.sides import Selection
from dinfer.session.runs.armed import Injected

Block = tuple[int, int, int]
"""(rank, chunk, layer)"""


class Mark(NamedTuple):
    """`text` says what is known, for people."""

    rank: int
    chunk: int
    layer: int
    kind: Literal["armed", "differs", "corrupt"]
    text: str


class Marks:
    """Those of one run. What a block is known to hold holds until it is compared anew, or until the run goes back
    before it."""

    def __init__(self) -> None:
        self._known: dict[Block, Mark] = {}

    def of(self, faults: Iterable[Injected]) -> tuple[Mark, ...]:
        """All of them, those of armed faults too."""
        return (*_armed(faults), *self._known.values())

    def note_corrupt(self, found: Corruption) -> None:
        """A rank has found that a block has changed."""
        block = (found.rank, found.chunk, found.layer)
        self._known[block] = Mark(*block, "corrupt", str(found))

    def note_diff(self, found: Diff, chosen: Selection) -> None:
        """The ranks have been compared: of what was compared, this is what is known now."""
        known = dict(self._known)
        for block in self._known:
            rank, chunk, layer = block
            if rank in chosen.ranks and chunk in chosen.spans and layer in chosen.layers:
                del known[block]
        for one in reversed(found.differences):  # a block is named by its first
            if one.chunk is not None:
                block = (one.rank, one.chunk, one.layer)
                known[block] = Mark(*block, "differs", str(one))
        self._known = known

    def went(self, plan: Plan, before: Cut, after: Cut) -> None:
        """Forget what is known of blocks that are no longer there."""
        for rank, lanes in enumerate(plan.lanes):
            for lane, was, now in zip(lanes, before[rank], after[rank], strict=True):
                for op in lane.ops[now:was]:
                    if op.kind == "layer" or (op.kind == "recv" and op.what == "kv"):
                        self._known.pop((rank, op.chunk, op.layer), None)


def _armed(faults: Iterable[Injected]) -> Sequence[Mark]:
    return [
        Mark(one.fault.rank, one.fault.chunk, one.fault.layer, "armed", str(one))
        for one in faults
        if one.fault.rank is not None
    ]

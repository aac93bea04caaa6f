"""What is known of NaN and Inf in one run: the first of each rank, as it has noted it, and all blocks, from events."""

from collections.abc import Iterable, Sequence

from dinfer.engine.finite import NonFinite
from dinfer.kv.difference import nonfinite_remark
from dinfer.kv.ledger import BlockKey
from dinfer.kv.source import Selection
from dinfer.messages import FirstNonFinite, Note
from dinfer.plan.cut import Cut
from dinfer.plan.plan import Plan
from dinfer.trace.events import Event


class NonFiniteBlocks:
    """`blocks`: by chunk and layer, the rank whose layer made NaN or Inf, and whether they are in K or V ("kv") or only
    in the hidden state after them ("hidden")."""

    def __init__(self) -> None:
        self._firsts: dict[int, NonFinite] = {}
        self.blocks: dict[BlockKey, tuple[int, str]] = {}
        self._found_at: dict[BlockKey, int] = {}
        self._begun_at: dict[BlockKey, int] = {}  # when its layer began last

    @property
    def first(self) -> NonFinite | None:
        """The one from which the others may have spread: the first by layer, chunk and rank."""
        return min(self._firsts.values(), key=lambda found: found.order, default=None)

    @property
    def text(self) -> str:
        """The first, and how many blocks followed; empty while all values are finite."""
        first = self.first
        if first is None:
            return ""
        since = len(self.blocks.keys() - {(first.chunk, first.layer)})
        return f"first {first}" + f"; {since:,} block{'s' * (since != 1)} since" * bool(since)

    def in_selection(self, chosen: Selection) -> str:
        """See `kv.difference.nonfinite_remark`."""
        kv = (block for block, (_, what) in self.blocks.items() if what == "kv")
        return nonfinite_remark(kv, chosen, self.text)

    def note(self, rank: int, found: NonFinite) -> bool:
        """A rank has found its first one; whether that is the first of all now."""
        self._firsts[rank] = found
        return self.first == found

    def take(self, events: Iterable[Event]) -> None:
        """Take the blocks out of new events, of each lane in order. One that was made again, without any, has none."""
        for event in events:
            if event.layer is None or event.chunk is None:
                continue
            block = (event.chunk, event.layer)
            if event.kind == "layer":
                self._begun_at[block] = event.start
                if self._found_at.get(block, event.start) < event.start:
                    self.blocks.pop(block, None)
            elif event.kind == "nonfinite" and event.end >= self._begun_at.get(block, event.end):
                self.blocks[block], self._found_at[block] = (event.rank, event.what), event.end

    def went(self, plan: Plan, before: Cut, after: Cut) -> None:
        """The run went from one cut to another: forget what was made by ops that are undone."""
        for rank, lanes in enumerate(plan.lanes):
            first = self._firsts.get(rank)
            for lane, was, now in zip(lanes, before[rank], after[rank], strict=True):
                for op in lane.ops[now:was]:
                    if op.kind == "layer":
                        self.blocks.pop((op.chunk, op.layer), None)
                    if first and (op.kind, op.chunk, op.layer) == (first.op, first.chunk, first.layer):
                        self._firsts.pop(rank, None)


def nonfinite_of(notes: Sequence[Iterable[Note]], events: Iterable[Event]) -> NonFiniteBlocks:
    """What the notes, by rank, and the events of a whole run say."""
    known = NonFiniteBlocks()
    for rank, noted in enumerate(notes):
        for note in noted:
            if isinstance(note, FirstNonFinite):
                known.note(rank, NonFinite.of(note.found))
    known.take(events)
    return known

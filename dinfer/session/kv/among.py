"""Among: the wrong blocks between the ranks of one source.

The right bytes of a block are those that were computed, as the ledgers tell; without one, those that most ranks hold,
the owner's if no more do.
"""

from collections.abc import Sequence

from dinfer.engine.ledger import Digests, Key
from dinfer.session.kv.detail import Case, Side, chunk_of
from dinfer.session.kv.origin import Origin, Way, truth
from dinfer.session.kv.sides import Blocks, Selection, blocks_of, expected_rows
from dinfer.session.kv.source import Noted, Source


class Among:
    """The wrong blocks among the ranks of one source."""

    def __init__(self, source: Source, chosen: Selection, blocks: Sequence[Blocks]) -> None:
        self._source, self._chosen, self._blocks = source, chosen, blocks
        self.way = Way(source.subject.plan)
        self._owners = source.subject.plan.shape.owners
        self._noted = dict(zip(chosen.ranks, source.noted(chosen.ranks, chosen.layers), strict=True))
        self._others: dict[int, tuple[dict[int, dict[Key, Noted]], list[Blocks]]] = {}

    def cases(self, shared: Sequence[Key]) -> list[Case]:
        return [case for span, layer in shared for case in self._of_block(span, layer)]

    def good_side(self, side: Side, layer: int) -> Side | None:
        """Another rank whose layer is of the right length."""
        for one in self._blocks:
            if one.side.rank != side.rank and one.held.rows[layer] == expected_rows(
                self._source, one.held, layer
            ):
                return one.side
        return None

    def _of_block(self, span: int, layer: int) -> list[Case]:
        right = self._right(span, layer)
        wrong = [one for one in self._blocks if one.now[span, layer] != right]
        if not wrong:
            return []
        noted, everybody = self._all(layer)
        here = {one.side.rank: one.now[span, layer] for one in everybody if (span, layer) in one.now}
        known = {rank: said[span, layer] for rank, said in noted.items() if (span, layer) in said}
        good = next((one.side for one in everybody if here.get(one.side.rank) == right), None)
        return [self._case(one.side, good, span, layer, known, here) for one in wrong]

    def _case(
        self,
        side: Side,
        good: Side | None,
        span: int,
        layer: int,
        noted: dict[int, Noted],
        now: dict[int, Digests],
    ) -> Case:
        subject, rank = self._source.subject, side.rank
        if chunk_of(subject, span) is None:
            origin, hops = Origin(rank, "compute", "decode", "computed there in decode"), 0
        else:
            origin = self.way.origin(rank, span, layer, noted, now)
            hops = self.way.hops(rank, span, layer)
        return Case(side, good, self._owners[layer], layer, span, subject.spans[span], origin, hops)

    def _right(self, span: int, layer: int) -> Digests:
        owner = self._owners[layer]
        noted = {rank: said[span, layer] for rank, said in self._noted.items() if (span, layer) in said}
        if (known := truth(noted, owner)) is not None:
            return known
        found = [one.now[span, layer] for one in self._blocks]
        owners = [one.now[span, layer] for one in self._blocks if one.side.rank == owner]
        return max([*owners, *found], key=lambda digests: found.count(digests))

    def _all(self, layer: int) -> tuple[dict[int, dict[Key, Noted]], list[Blocks]]:
        """What the ledgers of all ranks say of a layer, and what all ranks hold of it."""
        if layer not in self._others:
            ranks = tuple(self._source.ranks)
            noted = dict(zip(ranks, self._source.noted(ranks, [layer]), strict=True))
            chosen = Selection(ranks, (layer,), self._chosen.spans)
            names = [f"rank {rank}" for rank in ranks]
            self._others[layer] = noted, blocks_of(self._source, chosen, names, self._source.subject.spans)
        return self._others[layer]

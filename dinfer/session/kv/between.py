"""Between: the blocks that differ between two sources, and whether it was since they were computed."""

from collections.abc import Sequence

from dinfer.engine.ledger import Key
from dinfer.session.kv.detail import Case, Side, chunk_of
from dinfer.session.kv.origin import Origin, Way, truth
from dinfer.session.kv.sides import Blocks, Selection, blocks_of, expected_rows
from dinfer.session.kv.source import Noted, Source


def cases_between(
    one: Source, other: Source, mine: Sequence[Blocks], right: Sequence[Blocks], shared: Sequence[Key],
    spans: Sequence[range],
) -> list[Case]:  # fmt: skip
    origins = _Origins(one), _Origins(other)
    owners = one.subject.plan.shape.owners
    return [
        Case(a.side, b.side, owners[layer], layer, span, spans[span], _between(origins, a, b, span, layer), 0)
        for span, layer in shared
        for a, b in zip(mine, right, strict=True)
        if a.now[span, layer] != b.now[span, layer]
    ]


class _Origins:
    """Whether a source's bytes changed after they were computed, by its own ledgers."""

    def __init__(self, source: Source) -> None:
        self._source, self.way = source, Way(source.subject.plan)
        self._found: dict[int, tuple[dict[int, dict[Key, Noted]], list[Blocks]]] = {}

    def of(self, rank: int, span: int, layer: int) -> Origin | None:
        subject, ranks = self._source.subject, tuple(self._source.ranks)
        if chunk_of(subject, span) is None or layer not in range(subject.plan.shape.layers):
            return None
        if layer not in self._found:
            noted = dict(zip(ranks, self._source.noted(ranks, [layer]), strict=True))
            chosen = Selection(ranks, (layer,), tuple(range(len(subject.plan.shape.chunks))))
            self._found[layer] = noted, blocks_of(self._source, chosen, [""] * len(ranks), subject.spans)
        noted, blocks = self._found[layer]
        known = {one: said[span, layer] for one, said in noted.items() if (span, layer) in said}
        now = {one.side.rank: one.now[span, layer] for one in blocks if (span, layer) in one.now}
        right = truth(known, subject.plan.shape.owners[layer])
        if right is None or now.get(rank) == right:
            return None
        return self.way.origin(rank, span, layer, known, now)


def _between(origins: tuple[_Origins, _Origins], a: Blocks, b: Blocks, span: int, layer: int) -> Origin:
    mine, theirs = origins
    if found := mine.of(a.side.rank, span, layer):
        return found
    subject, other = a.side.source.subject, b.side.source.subject
    same_chunks = subject.plan.shape.chunks == other.plan.shape.chunks
    if same_chunks and (found := theirs.of(b.side.rank, span, layer)):
        return found._replace(text=f"in {other.name}: {found.text}")
    if chunk_of(subject, span) is None:
        return Origin(a.side.rank, "compute", "decode", "computed in decode")
    owner = mine.way.path(a.side.rank, span, layer)[0]
    return Origin(owner, "compute", f"layer c{span} l{layer}", "it was computed so, or no ledger tells")


def common_spans(one: Source, other: Source) -> tuple[range, ...]:
    """The first one's, of the tokens that both have: new ones as far as they are the same."""
    pairs = enumerate(zip(one.subject.ids, other.subject.ids, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), min(len(one.subject.ids), len(other.subject.ids)))
    last = min(max(same, len(one.subject.prompt)), one.subject.spans[-1].stop, other.subject.spans[-1].stop)
    return tuple(range(span.start, min(span.stop, last)) for span in one.subject.spans)


def good_other(blocks: Blocks, layer: int) -> Side | None:
    right = expected_rows(blocks.side.source, blocks.held, layer)
    return blocks.side if blocks.held.rows[layer] == right else None

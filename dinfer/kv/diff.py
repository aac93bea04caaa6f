"""Diff: where KV differs between the ranks of one source, or between two sources.

Lengths first, then digests of blocks; of blocks that differ, the digests of rows; of rows that differ, values. Whatever
is equal does not travel. Between the ranks of one source the right bytes of a block are those that were computed, as
its ledger tells; without one, those that most ranks hold, the owner's if no more do.
"""

from collections.abc import Sequence

from dinfer.kv.difference import Compared, Diff, Difference, equal_text, unequal_text
from dinfer.kv.ledger import BlockKey, Digests
from dinfer.kv.lengths import Overlong
from dinfer.kv.locate import Details, WrongBlock
from dinfer.kv.origin import BlockRoute, Origin, truth
from dinfer.kv.source import (
    HeldBlocks,
    Noted,
    Selection,
    Side,
    Source,
    blocks_of,
    chunk_of,
    expected_rows,
    shared_of,
)
from dinfer.plan.ops import PlanError


class Among:
    """The wrong blocks among the ranks of one source."""

    def __init__(self, source: Source, chosen: Selection, blocks: Sequence[HeldBlocks]) -> None:
        self._source, self._chosen, self._blocks = source, chosen, blocks
        self.way = BlockRoute(source.subject.plan)
        self._owners = source.subject.plan.shape.owners
        self._noted = dict(zip(chosen.ranks, source.noted(chosen.ranks, chosen.layers), strict=True))
        self._others: dict[int, tuple[dict[int, dict[BlockKey, Noted]], list[HeldBlocks]]] = {}

    def cases(self, shared: Sequence[BlockKey]) -> list[WrongBlock]:
        return [case for span, layer in shared for case in self._of_block(span, layer)]

    def good_side(self, side: Side, layer: int) -> Side | None:
        """Another rank whose layer is of the right length."""
        for one in self._blocks:
            if one.side.rank != side.rank and one.held.rows[layer] == expected_rows(
                self._source, one.held, layer
            ):
                return one.side
        return None

    def _of_block(self, span: int, layer: int) -> list[WrongBlock]:
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
    ) -> WrongBlock:
        subject, rank = self._source.subject, side.rank
        if chunk_of(subject, span) is None:
            origin, hops = Origin(rank, "compute", "decode", "computed there in decode"), 0
        else:
            origin = self.way.origin(rank, span, layer, noted, now)
            hops = self.way.hops(rank, span, layer)
        return WrongBlock(side, good, self._owners[layer], layer, span, subject.spans[span], origin, hops)

    def _right(self, span: int, layer: int) -> Digests:
        owner = self._owners[layer]
        noted = {rank: said[span, layer] for rank, said in self._noted.items() if (span, layer) in said}
        if (known := truth(noted, owner)) is not None:
            return known
        found = [one.now[span, layer] for one in self._blocks]
        owners = [one.now[span, layer] for one in self._blocks if one.side.rank == owner]
        return max([*owners, *found], key=lambda digests: found.count(digests))

    def _all(self, layer: int) -> tuple[dict[int, dict[BlockKey, Noted]], list[HeldBlocks]]:
        """What the ledgers of all ranks say of a layer, and what all ranks hold of it."""
        if layer not in self._others:
            ranks = tuple(self._source.ranks)
            noted = dict(zip(ranks, self._source.noted(ranks, [layer]), strict=True))
            chosen = Selection(ranks, (layer,), self._chosen.spans)
            names = [f"rank {rank}" for rank in ranks]
            self._others[layer] = noted, blocks_of(self._source, chosen, names, self._source.subject.spans)
        return self._others[layer]


def cases_between(
    one: Source, other: Source, mine: Sequence[HeldBlocks], right: Sequence[HeldBlocks], shared: Sequence[BlockKey],
    spans: Sequence[range],
) -> list[WrongBlock]:  # fmt: skip
    origins = _Origins(one), _Origins(other)
    owners = one.subject.plan.shape.owners
    return [
        WrongBlock(
            a.side, b.side, owners[layer], layer, span, spans[span], _between(origins, a, b, span, layer), 0
        )
        for span, layer in shared
        for a, b in zip(mine, right, strict=True)
        if a.now[span, layer] != b.now[span, layer]
    ]


class _Origins:
    """Whether a source's bytes changed after they were computed, by its own ledgers."""

    def __init__(self, source: Source) -> None:
        self._source, self.way = source, BlockRoute(source.subject.plan)
        self._found: dict[int, tuple[dict[int, dict[BlockKey, Noted]], list[HeldBlocks]]] = {}

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


def _between(
    origins: tuple[_Origins, _Origins], a: HeldBlocks, b: HeldBlocks, span: int, layer: int
) -> Origin:
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


def good_other(blocks: HeldBlocks, layer: int) -> Side | None:
    right = expected_rows(blocks.side.source, blocks.held, layer)
    return blocks.side if blocks.held.rows[layer] == right else None


VALUES = 256
"""of how many tokens' rows a diff fetches the values, unless it is told otherwise"""

_CLASS = {"missing": 0, "extra": 0, "repeated": 0, "shifted": 0, "value": 2}
"""rows too many or too few come first, then rows that are others, then values"""


def diff_ranks(source: Source, chosen: Selection, values: int | None = VALUES) -> Diff:
    """Between the ranks of one source."""
    before = source.bytes_moved
    blocks = blocks_of(source, chosen, [f"rank {rank}" for rank in chosen.ranks], source.subject.spans)
    shared = shared_of(blocks, chosen, len(blocks))
    if not shared:
        raise PlanError(f"no block is on {_all_of(chosen.ranks)} yet; {_stands(source)}.")
    found = Among(source, chosen, blocks)
    overlong = Overlong(source.subject, [(one.side, one.held) for one in blocks], chosen.layers, found.way)
    differences = overlong.differences(found.good_side)
    details = Details(values, overlong.known)
    for case in found.cases(shared):
        differences += details.of(case)
    compared = Compared(
        source.subject, chosen.ranks, chosen.layers, tuple(shared), source.subject.plan.world_size, ""
    )
    return _made(compared, differences, details, source.bytes_moved - before)


def diff_sources(one: Source, other: Source, chosen: Selection, values: int | None = VALUES) -> Diff:
    """Between each chosen rank of `one` and the same rank of `other`, or its first where it has none such."""
    check_comparable(one, other)
    before = one.bytes_moved + other.bytes_moved
    theirs = [rank if rank in other.ranks else min(other.ranks) for rank in chosen.ranks]
    spans = common_spans(one, other)
    mine = blocks_of(one, chosen, [f"rank {rank} of {one.subject.name}" for rank in chosen.ranks], spans)
    names = [f"rank {rank} of {other.subject.name}" for rank in theirs]
    right = blocks_of(other, chosen._replace(ranks=tuple(theirs)), names, spans, by_rows=True)
    shared = shared_of([*mine, *right], chosen, len(mine) + len(right))
    if not shared:
        raise PlanError(
            f"{one.subject.name} and {other.subject.name} have no block in common; {_stands(one)}."
        )
    overlong = Overlong(
        one.subject, [(b.side, b.held) for b in mine], chosen.layers, BlockRoute(one.subject.plan)
    )
    by_name = {a.side.name: b for a, b in zip(mine, right, strict=True)}
    differences = overlong.differences(lambda side, layer: good_other(by_name[side.name], layer))
    details = Details(values, overlong.known)
    for case in cases_between(one, other, mine, right, shared, spans):
        differences += details.of(case)
    compared = Compared(
        one.subject,
        chosen.ranks,
        chosen.layers,
        tuple(shared),
        one.subject.plan.world_size,
        other.subject.name,
    )
    return _made(compared, differences, details, one.bytes_moved + other.bytes_moved - before)


def check_comparable(one: Source, other: Source) -> None:
    """Raises PlanError where a comparison would mean nothing."""
    a, b = one.subject, other.subject
    names = f"{a.name} and {b.name}"
    if a.checkpoint != b.checkpoint:
        raise PlanError(f"{names} are of different checkpoints: compare runs of one model.")
    if a.prompt != b.prompt:
        at = next((n for n, (x, y) in enumerate(zip(a.prompt, b.prompt, strict=False)) if x != y), None)
        where = f"first at token {at}" if at is not None else f"{len(a.prompt)} and {len(b.prompt)} tokens"
        raise PlanError(f"{names} are of different prompts ({where}): compare runs of one prompt.")
    sizes = [(s.plan.shape.layers, s.kv_heads, s.head_dim) for s in (a, b)]
    if sizes[0] != sizes[1]:
        raise PlanError(
            f"{names} hold KV of different shapes: (layers, KV heads, head size) {sizes[0]} and {sizes[1]}."
        )
    if a.dtype != b.dtype:
        mine, theirs = (str(s.dtype).removeprefix("torch.") for s in (a, b))
        raise PlanError(
            f"{names} hold {mine} and {theirs}: every value differs in its bits. Load both in one dtype, or "
            'see what the dtype does with run.compare("reference", dtype=…).'
        )


def _made(compared: Compared, differences: list[Difference], details: Details, moved: int) -> Diff:
    ordered = sorted(differences, key=_order)
    verdict = unequal_text(compared, ordered, details.values) if ordered else equal_text(compared)
    return Diff(verdict, tuple(ordered), moved, details.rows, details.unfetched)


def _order(one: Difference) -> tuple[int, ...]:
    kind = 0 if one.tensor is None else _CLASS.get(one.kind, 1) or 1
    chunk = one.chunk if one.chunk is not None else 1 << 30
    return (kind, chunk, one.layer, one.hops, one.rank, one.token or 0, one.tensor == "V", one.head or 0)


def _all_of(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {' and '.join(map(str, ranks))}"


def _stands(source: Source) -> str:
    return f"the run stands {source.subject.stands}"

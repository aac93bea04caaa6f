"""Diff: where KV differs between the ranks of one source, or between two sources.

Lengths first, then digests of blocks; of blocks that differ, the digests of rows; of rows that differ, values. What is
equal does not travel. Between the ranks of one source the right bytes of a block are those that were computed, as the
ledgers say; without a ledger, those that most ranks hold, and the owner's where no more ranks do.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinfer.kv.difference import Compared, Diff, Difference, equal_text, unequal_text
from dinfer.kv.digests import as_numbers, row_digests
from dinfer.kv.ledger import BlockKey, Digests
from dinfer.kv.origin import BlockRoute, Origin, truth
from dinfer.kv.rows import Finding, Nearby, RowKind, concerned, identify, numbers_text, repeats
from dinfer.kv.source import HeldSpans, Noted, Selection, Side, Source, chunk_of, expected_rows
from dinfer.plan.ops import PlanError

VALUES = 256
"""of how many tokens' rows a diff fetches the values, by default"""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_CLASS = {"missing": 0, "extra": 0, "repeated": 0, "shifted": 0, "value": 2}
"""rows too many or too few come first, then rows that are other rows, then values"""


def diff_ranks(source: Source, chosen: Selection, values: int | None = VALUES) -> Diff:
    """Between the ranks of one source. Raises PlanError where they have no block in common yet."""
    before, subject = source.bytes_moved, source.subject
    held = source.held(chosen.ranks)
    blocks = _held_blocks(source, held, chosen, subject.spans, "")
    shared = _shared(blocks, chosen)
    if not shared:
        which = f"rank{'s' * (len(blocks) > 1)} {' and '.join(map(str, chosen.ranks))}"
        raise PlanError(f"no block is on {which} yet; the run stands {subject.stands}.")
    noted = dict(zip(chosen.ranks, source.noted(chosen.ranks, chosen.layers), strict=True))
    evidence = _Evidence(source)
    found = _Differences(subject.spans, evidence.route, values)
    found.add_lengths([(one, blocks) for one in blocks], chosen.layers)
    for span, layer in shared:
        owner = subject.plan.shape.owners[layer]
        right = truth({rank: one[span, layer] for rank, one in noted.items() if (span, layer) in one}, owner)
        if right is None:
            right = _of_most(blocks, (span, layer), owner)
        for one in blocks:
            if one.now[span, layer] != right:
                holder = evidence.holder(span, layer, right)
                found.add_block(one.side, holder, span, layer, evidence.origin(one.side.rank, span, layer))
    return found.diff(Compared(subject, chosen.ranks, chosen.layers, shared), source.bytes_moved - before)


def diff_sources(one: Source, other: Source, chosen: Selection, values: int | None = VALUES) -> Diff:
    """Between each chosen rank of `one` and the same rank of `other`, or its first where it has none such. Raises
    PlanError where that would mean nothing, or nothing can be compared yet."""
    check_comparable(one, other)
    before, subject = one.bytes_moved + other.bytes_moved, one.subject
    ranks = tuple(rank if rank in other.ranks else min(other.ranks) for rank in chosen.ranks)
    spans = _common_spans(one, other)
    mine = _held_blocks(one, one.held(chosen.ranks), chosen, spans, f" of {subject.name}")
    there = chosen._replace(ranks=ranks)
    theirs = _held_blocks(other, other.held(ranks), there, spans, f" of {other.subject.name}", by_rows=True)
    shared = _shared([*mine, *theirs], chosen)
    if not shared:
        names = f"{subject.name} and {other.subject.name}"
        raise PlanError(f"{names} have no block in common; the run stands {subject.stands}.")
    evidence = _Evidence(one), _Evidence(other)
    found = _Differences(spans, evidence[0].route, values)
    found.add_lengths([(a, [b]) for a, b in zip(mine, theirs, strict=True)], chosen.layers)
    for span, layer in shared:
        for a, b in zip(mine, theirs, strict=True):
            if a.now[span, layer] != b.now[span, layer]:
                origin = _origin_between(*evidence, a.side, b.side, span, layer)
                found.add_block(a.side, b.side, span, layer, origin._replace(hops=0))
    compared = Compared(subject, chosen.ranks, chosen.layers, shared, other.subject.name)
    return found.diff(compared, one.bytes_moved + other.bytes_moved - before)


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


def _common_spans(one: Source, other: Source) -> tuple[range, ...]:
    """The first source's spans, of the tokens that both have: new ones as far as they are the same."""
    pairs = enumerate(zip(one.subject.ids, other.subject.ids, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), min(len(one.subject.ids), len(other.subject.ids)))
    last = min(max(same, len(one.subject.prompt)), one.subject.spans[-1].stop, other.subject.spans[-1].stop)
    return tuple(range(span.start, min(span.stop, last)) for span in one.subject.spans)


# -- what is held


class _Held(NamedTuple):
    """What one side holds of a selection; `now`: the digests of the blocks that are there, by span and layer."""

    side: Side
    held: HeldSpans
    now: dict[BlockKey, Digests]


def _held_blocks(
    source: Source,
    held: Sequence[HeldSpans],
    chosen: Selection,
    spans: Sequence[range],
    whose: str,
    *,
    by_rows: bool = False,
) -> list[_Held]:
    """The blocks that each chosen rank has. `by_rows`: the spans are another source's, and those count whose rows are
    there."""
    digests = source.digests(chosen.ranks, chosen.layers, [spans[n] for n in chosen.spans])
    found = []
    for rank, has, numbers in zip(chosen.ranks, held, digests, strict=True):
        now = dict[BlockKey, Digests]()
        for i, layer in enumerate(chosen.layers):
            rows = expected_rows(source.subject, has, layer)
            for j, span in enumerate(chosen.spans):
                is_here = spans[span].stop <= rows if by_rows else span < has.spans[layer]
                if spans[span] and is_here:
                    now[span, layer] = as_numbers(numbers[i, j])
        found.append(_Held(Side(source, rank, f"rank {rank}{whose}"), has, now))
    return found


def _shared(blocks: Sequence[_Held], chosen: Selection) -> tuple[BlockKey, ...]:
    """The blocks that all sides hold, in the order in which they are computed."""
    keys = [(span, layer) for span in chosen.spans for layer in chosen.layers]
    return tuple(key for key in keys if all(key in one.now for one in blocks))


def _of_most(blocks: Sequence[_Held], key: BlockKey, owner: int) -> Digests:
    """The digests that most sides hold; the owner's, if it is among those compared, where no more sides hold others."""
    found = [one.now[key] for one in blocks]
    owners = [one.now[key] for one in blocks if one.side.rank == owner]
    return max([*owners, *found], key=found.count)


# -- where it comes from


class _Evidence:
    """What all ranks of a source hold, and what their ledgers say: fetched a layer at a time, and only where something
    differs."""

    def __init__(self, source: Source) -> None:
        self.source, self.route = source, BlockRoute(source.subject.plan)
        self._layer = lru_cache(maxsize=None)(self._fetched)

    def _fetched(self, layer: int) -> tuple[dict[int, dict[BlockKey, Noted]], list[_Held]]:
        source, ranks = self.source, tuple(self.source.ranks)
        everything = Selection(ranks, (layer,), tuple(range(len(source.subject.spans))))
        noted = dict(zip(ranks, source.noted(ranks, [layer]), strict=True))
        return noted, _held_blocks(source, source.held(ranks), everything, source.subject.spans, "")

    def of(self, span: int, layer: int) -> tuple[dict[int, Noted], dict[int, Digests]]:
        """By rank, as far as they are known: what its ledger says of the block, and the digests of what it holds."""
        noted, blocks = self._layer(layer)
        key = (span, layer)
        return (
            {rank: of_rank[key] for rank, of_rank in noted.items() if key in of_rank},
            {one.side.rank: one.now[key] for one in blocks if key in one.now},
        )

    def holder(self, span: int, layer: int, right: Digests) -> Side | None:
        """A rank that holds these bytes."""
        ranks = [rank for rank, digests in self.of(span, layer)[1].items() if digests == right]
        return Side(self.source, ranks[0], f"rank {ranks[0]}") if ranks else None

    def origin(self, rank: int, span: int, layer: int) -> Origin:
        """Where a block that is wrong on that rank became so."""
        if chunk_of(self.source.subject, span) is None:
            return Origin(rank, "compute", "decode", "computed there in decode")
        return self.route.origin(rank, span, layer, *self.of(span, layer))

    def change(self, rank: int, span: int, layer: int) -> Origin | None:
        """The same, if the ledgers say that the rank's bytes are not those that were computed."""
        if chunk_of(self.source.subject, span) is None:
            return None
        noted, now = self.of(span, layer)
        right = truth(noted, self.source.subject.plan.shape.owners[layer])
        return None if right is None or now.get(rank) == right else self.origin(rank, span, layer)


def _origin_between(mine: _Evidence, theirs: _Evidence, a: Side, b: Side, span: int, layer: int) -> Origin:
    """Why two sides differ: bytes of one have changed, or they were computed so."""
    if found := mine.change(a.rank, span, layer):
        return found
    subject, other = mine.source.subject, theirs.source.subject
    same_chunks = subject.plan.shape.chunks == other.plan.shape.chunks
    if same_chunks and (found := theirs.change(b.rank, span, layer)):
        return found._replace(text=f"in {other.name}: {found.text}")
    if chunk_of(subject, span) is None:
        return Origin(a.rank, "compute", "decode", "computed in decode")
    owner = mine.route.path(a.rank, span, layer)[0]
    return Origin(owner, "compute", f"layer c{span} l{layer}", "it was computed so, or no ledger tells")


# -- from blocks to rows and values


class _WrongLength(NamedTuple):
    """A layer of a side that has `rows` rows where `right` should be."""

    side: Side
    layer: int
    rows: int
    right: int
    findings: list[Finding]

    def looks_like(self, other: "_WrongLength") -> bool:
        """Whether one sentence does for both."""
        mine, theirs = ([finding.text for finding in one.findings] for one in (self, other))
        return (self.rows, self.right, mine) == (other.rows, other.right, theirs)


class _WrongBlock(NamedTuple):
    """What `side` holds in these places, and where the right rows are: with `right`, or nowhere but as digests in a
    ledger."""

    side: Side
    right: Side | None
    span: int
    layer: int
    places: range
    origin: Origin


class _Differences:
    """Collects differences. `limit`: for how many tokens, in all blocks together, values are fetched; None: for all."""

    def __init__(self, spans: Sequence[range], route: BlockRoute, limit: int | None) -> None:
        self._spans, self._route, self._limit = spans, route, limit
        self._found: list[Difference] = []
        self._explained: dict[tuple[str, int], Tensor] = {}
        """by the side's name and the layer, the cells that are explained by its wrong length"""
        self._rows = self._unfetched = 0
        self._values: dict[str, int] = {}
        """how many values are known to differ, by side"""
        self._read = lru_cache(maxsize=None)(
            lambda side, layer, places: side.source.rows(side.rank, layer, places)
        )

    def diff(self, compared: Compared, moved: int) -> Diff:
        """All that was found, in order."""
        ordered = sorted(self._found, key=_order)
        verdict = unequal_text(compared, ordered, self._values) if ordered else equal_text(compared)
        return Diff(verdict, tuple(ordered), moved, self._rows, self._unfetched)

    # -- lengths

    def add_lengths(self, sides: Sequence[tuple[_Held, Sequence[_Held]]], layers: Sequence[int]) -> None:
        """Add a difference for each layer of a side that is too long or too short. With each side come others, of which
        one may hold the layer in its right length."""
        wrong = list[_WrongLength]()
        for one, others in sides:
            for layer in layers:
                rows, right = one.held.rows[layer], expected_rows(one.side.source.subject, one.held, layer)
                if rows == right:
                    continue
                got = one.side.source.rows(one.side.rank, layer, range(rows))
                good = next((b.side for b in others if _is_whole(b, layer)), None)
                want = good.source.rows(good.rank, layer, range(right)) if good else got
                findings = repeats(got, want)
                if findings:
                    cells = torch.stack([finding.cells for finding in findings]).any(0)
                    self._explained[one.side.name, layer] = cells
                wrong.append(_WrongLength(one.side, layer, rows, right, findings))
        self._found += [self._of_length(one, wrong, len(sides)) for one in wrong]

    def _of_length(self, one: _WrongLength, wrong: Sequence[_WrongLength], sides: int) -> Difference:
        source = next((finding.source for finding in one.findings if finding.source is not None), None)
        place = next((concerned(finding.cells)[0] for finding in one.findings if finding.cells.any()), None)
        at = source if source is not None else min(place or 0, one.right - 1)
        subject = one.side.source.subject
        span = next((n for n, span in enumerate(subject.spans) if at in span), 0)
        chunk = chunk_of(subject, span)
        op = "decode" if chunk is None else self._route.op(one.side.rank, chunk, one.layer)
        return Difference(
            rank=one.side.rank, layer=one.layer, chunk=chunk, tensor=None, head=None, token=place, dim=None,
            op=op if chunk is None else f"after `{op}` in rank {one.side.rank}'s memory", kind=_kind_of(one),
            where="compute" if chunk is None else "memory", rows=abs(one.rows - one.right), name=one.side.name,
            values=None, note=_length_text(one, wrong, sides),
        )  # fmt: skip

    # -- rows

    def add_block(self, side: Side, right: Side | None, span: int, layer: int, origin: Origin) -> None:
        """Add the differences of a block that is wrong on `side`. `right`: a side that holds the right one, if any."""
        subject = side.source.subject
        got, want = self._rows_of(side, layer, self._spans[span]), None
        if right:
            want = self._rows_of(right, layer, self._spans[span])
        elif chunk_of(subject, span) is not None:
            want = side.source.noted_rows(subject.plan.shape.owners[layer], span, layer)
        if want is None:
            block = _WrongBlock(side, right, span, layer, self._spans[span], origin)
            self._add(block, None, note="no rank holds the right rows, and no ledger has their digests")
            return
        count, start = min(len(got), len(want)), self._spans[span].start
        block = _WrongBlock(side, right, span, layer, range(start, start + count), origin)
        got, want = got[:count], want[:count]
        zero = int(row_digests(torch.zeros(1, 1, 1, subject.head_dim, dtype=subject.dtype)))
        found = identify(got, want, start, lambda: self._nearby(block), zero, self._explained_in(block))
        for finding in found.findings:
            self._add_rows(block, finding)
        self._add_values(block, found.left)

    def _rows_of(self, side: Side, layer: int, places: range) -> Tensor:
        digests: Tensor = self._read(side, layer, places)
        return digests

    def _nearby(self, block: _WrongBlock) -> Nearby:
        """The block before: its rows as they should be, or else as they are."""
        if not block.span:
            return Nearby(block.places.start, self._rows_of(block.side, block.layer, block.places)[:0], None)
        places = self._spans[block.span - 1]
        rows = self._rows_of(block.right or block.side, block.layer, places)
        return Nearby(places.start, rows, places.start)

    def _explained_in(self, block: _WrongBlock) -> Tensor | None:
        """The block's cells that are explained by the layer's wrong length; none after the layer's end."""
        known = self._explained.get((block.side.name, block.layer))
        if known is None:
            return None
        cells = torch.zeros((len(block.places), *known.shape[1:]), dtype=torch.bool)
        part = known[block.places.start : block.places.stop]
        cells[: len(part)] = part
        return cells

    def _add_rows(self, block: _WrongBlock, finding: Finding) -> None:
        """Add rows that are other rows: one difference of K and one of V."""
        self._rows += int(finding.cells.sum())
        chunk = chunk_of(block.side.source.subject, block.span)
        where = f"layer {block.layer}, {'new tokens' if chunk is None else f'chunk {chunk}'}"
        for tensor in (0, 1):
            cells = finding.cells[:, tensor]
            if cells.any():
                heads = cells.any(0).nonzero().flatten().tolist()
                token = block.places.start + concerned(cells)[0]
                self._add(
                    block, token, tensor, heads[0] if len(heads) == 1 else None, kind=finding.kind,
                    rows=int(cells.sum()), note=f"{block.side.name}, {where}: {finding.text}",
                )  # fmt: skip

    # -- values

    def _add_values(self, block: _WrongBlock, left: Tensor) -> None:
        """Add rows of other values: a difference each if their values may be fetched, else one for each tensor."""
        self._rows += int(left.sum())
        sides = [block.side, block.right]
        has_values = all(side is not None and side.source.has_values(block.layer) for side in sides)
        fetched = concerned(left)[: self._limit] if has_values else []
        if self._limit is not None:
            self._limit -= len(fetched)
        if fetched:
            self._add_fetched(block, fetched, left[fetched])
        rest = left.clone()
        rest[fetched] = False
        why = 'no rank holds what was computed: run.compare("reference")' if block.right is None else ""
        if has_values:
            self._unfetched += int(rest.sum())
        elif block.right:
            why = "its values were not saved"
        for tensor in (0, 1):
            rows = rest[:, tensor].nonzero().tolist()
            if rows:
                more = f"and {len(rows) - 1} rows more of this block" if len(rows) > 1 else ""
                self._add(
                    block, block.places.start + rows[0][0], tensor, rows[0][1], rows=len(rows),
                    note="; ".join(filter(None, [more, why])),
                )  # fmt: skip

    def _add_fetched(self, block: _WrongBlock, places: Sequence[int], cells: Tensor) -> None:
        assert block.right is not None
        tokens = [block.places.start + n for n in places]
        mine = block.side.source.values(block.side.rank, block.layer, tokens)
        theirs = block.right.source.values(block.right.rank, block.layer, tokens)
        integers = _INTEGERS[mine.element_size()]
        differs = mine.contiguous().view(integers) != theirs.contiguous().view(integers)
        for n, tensor, head in cells.nonzero().tolist():
            dims = differs[n, tensor, head].nonzero().flatten().tolist()
            self._values[block.side.name] = self._values.get(block.side.name, 0) + len(dims)
            at = (n, tensor, head, dims[0]) if dims else None
            self._add(
                block, tokens[n], tensor, head, dim=dims[0] if dims else None,
                values=(float(mine[at]), float(theirs[at])) if at else None, count=len(dims),
            )  # fmt: skip

    def _add(
        self,
        block: _WrongBlock,
        token: int | None,
        tensor: int | None = None,
        head: int | None = None,
        **fields: Any,
    ) -> None:
        subject, origin = block.side.source.subject, block.origin
        about: dict[str, Any] = {"dim": None, "values": None, "kind": "value", **fields}
        self._found.append(
            Difference(
                rank=block.side.rank, layer=block.layer, chunk=chunk_of(subject, block.span),
                tensor=None if tensor is None else ("K", "V")[tensor], head=head, token=token, op=origin.op,
                where=origin.where, hops=origin.hops, origin=origin.text, name=block.side.name,
                label=subject.label(token), dtype=subject.dtype, **about,
            )
        )  # fmt: skip


def _is_whole(one: _Held, layer: int) -> bool:
    """Whether the layer has as many rows there as it should."""
    return one.held.rows[layer] == expected_rows(one.side.source.subject, one.held, layer)


def _kind_of(one: _WrongLength) -> RowKind:
    found = [finding.kind for finding in one.findings]
    order: tuple[RowKind, ...] = ("repeated", "missing", "shifted", "extra")
    return next((kind for kind in order if kind in found), "extra" if one.rows > one.right else "missing")


def _length_text(one: _WrongLength, wrong: Sequence[_WrongLength], sides: int) -> str:
    """For example `rank 0 holds 52 tokens of layer 0, the others 26; rows 26–51 repeat rows 0–25`."""
    alike = [other for other in wrong if other.looks_like(one)]
    names = {other.side.name for other in alike if other.layer == one.layer}
    layers = sorted({other.layer for other in alike if other.side.name == one.side.name})
    everyone = len(names) == sides > 1
    who = f"all {len(names)} ranks hold" if everyone else f"{one.side.name} holds"
    others = {other.side.name for other in wrong if other.layer == one.layer} - {one.side.name}
    right = f"it should be {one.right}" if everyone or others or sides == 1 else f"the others {one.right}"
    texts = [finding.text for finding in one.findings]
    more = [f"and {len(texts) - 4} more such"] * (len(texts) > 4)
    which = f"layer{'s' * (len(layers) > 1)} {numbers_text(layers)}"
    return "; ".join([f"{who} {one.rows} tokens of {which}, {right}", *texts[:4], *more])


def _order(one: Difference) -> tuple[int, ...]:
    kind = 0 if one.tensor is None else _CLASS.get(one.kind, 1) or 1
    chunk = one.chunk if one.chunk is not None else 1 << 30
    return (kind, chunk, one.layer, one.hops, one.rank, one.token or 0, one.tensor == "V", one.head or 0)

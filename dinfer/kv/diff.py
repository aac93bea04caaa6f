"""Diff: where KV differs between the ranks of one source, or between two sources.

Lengths first, then digests of blocks; of blocks that differ, the digests of rows; of rows that differ, values. What is
equal does not travel. Between the ranks of one source the right bytes of a block are those that were computed, as the
ledgers say; without a ledger, those that most ranks hold, and the owner's where no more ranks do.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinfer.codec.choice import Codec
from dinfer.kv.difference import Compared, Diff, Difference, equal_text, unequal_text
from dinfer.kv.digests import as_numbers, row_digests
from dinfer.kv.ledger import BlockKey, Digests
from dinfer.kv.measure import changed
from dinfer.kv.origin import BlockRoute, Origin, truth
from dinfer.kv.rows import Finding, Nearby, RowKind, concerned, identify, numbers_text, repeats
from dinfer.kv.source import HeldSpans, Noted, Selection, Source, Subject
from dinfer.plan.ops import NothingYet, PlanError

VALUES = 256
"""of how many tokens' rows a diff fetches the values, by default"""


def diff_ranks(source: Source, chosen: Selection, values: int | None = VALUES) -> Diff:
    """Between the ranks of one source. Raises PlanError where they have no block in common yet."""
    before, subject = source.bytes_moved, source.subject
    blocks = held_blocks(source, source.held(chosen.ranks), chosen, subject.spans)
    shared = _shared(blocks, chosen)
    if not shared:
        which = f"rank{'s' * (len(blocks) > 1)} {numbers_text(chosen.ranks)}"
        raise NothingYet(f"no block is on {which} yet; the run stands {subject.stands}.")
    noted = dict(zip(chosen.ranks, source.noted(chosen.ranks, chosen.layers), strict=True))
    evidence = _Evidence(source)
    found = _Differences(subject.spans, evidence.route, values)
    found.add_lengths([(one, blocks) for one in blocks], chosen.layers)
    for key in shared:
        span, layer = key
        owner = subject.plan.shape.owners[layer]
        right = truth({rank: one[key] for rank, one in noted.items() if key in one}, owner)
        if right is None:  # what most hold; the owner's, if it is compared, where no more ranks hold others
            held = [one.now[key] for one in blocks]
            owners = [one.now[key] for one in blocks if one.side.rank == owner]
            right = max([*owners, *held], key=held.count)
        for one in blocks:
            if one.now[key] != right:
                holder = evidence.holder(span, layer, right)
                found.add_block(one.side, holder, span, layer, evidence.origin(one.side.rank, span, layer))
    return found.diff(Compared(subject, chosen.ranks, chosen.layers, shared), source.bytes_moved - before)


def diff_sources(one: Source, other: Source, chosen: Selection, values: int | None = VALUES) -> Diff:
    """Between each chosen rank of `one` and the same rank of `other`, or its first where it has none such. Raises
    PlanError where that would mean nothing, or nothing can be compared yet."""
    before, subject, theirs = one.bytes_moved + other.bytes_moved, one.subject, other.subject
    check_alike(subject, theirs)
    spans = _common_spans(subject, theirs)
    there = chosen._replace(ranks=tuple(r if r in other.ranks else min(other.ranks) for r in chosen.ranks))
    mine = held_blocks(one, one.held(chosen.ranks), chosen, spans, f" of {subject.name}")
    others = held_blocks(other, other.held(there.ranks), there, spans, f" of {theirs.name}")
    shared = _shared([*mine, *others], chosen)
    if not shared:
        raise NothingYet(
            f"{subject.name} and {theirs.name} have no block in common; the run stands {subject.stands}."
        )
    evidence = _Evidence(one), _Evidence(other)
    found = _Differences(spans, evidence[0].route, values)
    pairs = list(zip(mine, others, strict=True))
    found.add_lengths([(a, [b]) for a, b in pairs], chosen.layers)
    for span, layer in shared:
        for a, b in pairs:
            if a.now[span, layer] != b.now[span, layer]:
                origin = _origin_between(*evidence, a.side, b.side, span, layer)
                found.add_block(a.side, b.side, span, layer, origin._replace(hops=0))
    compared = Compared(subject, chosen.ranks, chosen.layers, shared, theirs.name)
    return _with_choice(found.diff(compared, one.bytes_moved + other.bytes_moved - before), subject, theirs)


def _with_choice(found: Diff, one: Subject, other: Subject) -> Diff:
    """The diff, which says so where all that differs follows from the runs' codecs: values that were computed so. What
    was changed on the way or in memory, rows in wrong places, NaN and Inf do not."""
    codecs = one.codec, other.codec
    lossy = any(Codec.of(codec).is_lossy for codec in codecs)
    if found.equal or codecs[0] == codecs[1] or not lossy:
        return found
    if any(one.kind != "value" or one.where != "compute" or one.has_nan for one in found.differences):
        return found
    apart = dict[str, float]()
    for one_value in found.differences:
        if one_value.values is not None and one_value.tensor:
            a, b = one_value.values
            apart[one_value.tensor] = max(abs(a - b), apart.get(one_value.tensor, 0.0))
    by = " and ".join(f"{name} by up to {apart[name]:.3g}" for name in sorted(apart))
    return replace(
        found,
        verdict=f"a chosen loss, codec {codecs[0]} beside {codecs[1]}: {by}; {found.verdict}",
        chosen=True,
    )


def check_alike(a: Subject, b: Subject) -> None:
    """Raises PlanError where a comparison would mean nothing."""
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
        raise PlanError(
            f"{names} hold {a.dtype_name} and {b.dtype_name}: every value differs in its bits. Load both in one dtype, "
            'or see what the dtype does with run.compare("reference", dtype=…).'
        )


def _common_spans(one: Subject, other: Subject) -> tuple[range, ...]:
    """The first one's spans, of the tokens that both have: new ones as far as they are the same."""
    pairs = enumerate(zip(one.ids, other.ids, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), min(len(one.ids), len(other.ids)))
    last = min(max(same, len(one.prompt)), one.spans[-1].stop, other.spans[-1].stop)
    return tuple(range(span.start, min(span.stop, last)) for span in one.spans)


# -- what is held


class _Side(NamedTuple):
    """One side of a comparison: a rank of a source, and what to call it in messages."""

    source: Source
    rank: int
    name: str

    def rows(self, layer: int, places: range) -> Tensor:
        return self.source.rows(self.rank, layer, places)


class Held(NamedTuple):
    """What one side holds of a selection; `now`: the digests of the blocks that are there."""

    side: _Side
    held: HeldSpans
    now: dict[BlockKey, Digests]

    def due(self, layer: int) -> int:
        """How many rows there should be."""
        return self.side.source.subject.due(self.held, layer)


def held_blocks(
    source: Source, held: Sequence[HeldSpans], chosen: Selection, spans: Sequence[range], whose: str = ""
) -> list[Held]:
    """What each chosen rank has; `spans` may be another source's."""
    digests = source.digests(chosen.ranks, chosen.layers, [spans[n] for n in chosen.spans])
    found = []
    for rank, has, numbers in zip(chosen.ranks, held, digests, strict=True):
        one = Held(_Side(source, rank, f"rank {rank}{whose}"), has, {})
        for i, layer in enumerate(chosen.layers):
            due = one.due(layer)
            for j, span in enumerate(chosen.spans):
                if spans[span] and spans[span].stop <= due:
                    one.now[span, layer] = as_numbers(numbers[i, j])
        found.append(one)
    return found


def _shared(blocks: Sequence[Held], chosen: Selection) -> tuple[BlockKey, ...]:
    """The blocks that all sides hold, in the order in which they are computed."""
    keys = [(span, layer) for span in chosen.spans for layer in chosen.layers]
    return tuple(key for key in keys if all(key in one.now for one in blocks))


# -- where it comes from


class _Evidence:
    """What all ranks of a source hold, and what their ledgers say: fetched a layer at a time, and only where something
    differs."""

    def __init__(self, source: Source) -> None:
        self.source, self.route = source, BlockRoute(source.subject.plan)
        self._layer = lru_cache(maxsize=None)(self._fetched)

    def _fetched(self, layer: int) -> tuple[dict[int, dict[BlockKey, Noted]], list[Held]]:
        source, ranks = self.source, tuple(self.source.ranks)
        everything = Selection(ranks, (layer,), tuple(range(len(source.subject.spans))))
        noted = dict(zip(ranks, source.noted(ranks, [layer]), strict=True))
        return noted, held_blocks(source, source.held(ranks), everything, source.subject.spans)

    def of(self, span: int, layer: int) -> tuple[dict[int, Noted], dict[int, Digests]]:
        """By rank, as far as they are known: what its ledger says of the block, and the digests of what it holds."""
        noted, blocks = self._layer(layer)
        key = (span, layer)
        return (
            {rank: of_rank[key] for rank, of_rank in noted.items() if key in of_rank},
            {one.side.rank: one.now[key] for one in blocks if key in one.now},
        )

    def holder(self, span: int, layer: int, right: Digests) -> _Side | None:
        """A rank that holds these bytes."""
        ranks = [rank for rank, digests in self.of(span, layer)[1].items() if digests == right]
        return _Side(self.source, ranks[0], f"rank {ranks[0]}") if ranks else None

    def origin(self, rank: int, span: int, layer: int) -> Origin:
        """Where a block that is wrong on that rank became so."""
        if self.source.subject.chunk_of(span) is None:
            return Origin(rank, "compute", "decode", "computed there in decode")
        return self.route.origin(rank, span, layer, *self.of(span, layer))

    def change(self, rank: int, span: int, layer: int) -> Origin | None:
        """The same, if the ledgers say that the rank's bytes are not those that were computed."""
        if self.source.subject.chunk_of(span) is None:
            return None
        noted, now = self.of(span, layer)
        right = truth(noted, self.source.subject.plan.shape.owners[layer])
        return None if right is None or now.get(rank) == right else self.origin(rank, span, layer)


def _origin_between(mine: _Evidence, theirs: _Evidence, a: _Side, b: _Side, span: int, layer: int) -> Origin:
    """Why two sides differ: bytes of one have changed, or they were computed so."""
    if found := mine.change(a.rank, span, layer):
        return found
    subject, other = mine.source.subject, theirs.source.subject
    same_chunks = subject.plan.shape.chunks == other.plan.shape.chunks
    if same_chunks and (found := theirs.change(b.rank, span, layer)):
        return found._replace(text=f"in {other.name}: {found.text}")
    if subject.chunk_of(span) is None:
        return Origin(a.rank, "compute", "decode", "computed in decode")
    owner = mine.route.path(a.rank, span, layer)[0]
    return Origin(owner, "compute", f"layer c{span} l{layer}", "it was computed so, or no ledger tells")


# -- from blocks to rows and values


class _WrongLength(NamedTuple):
    """A layer of a side that has `rows` rows where `right` should be."""

    side: _Side
    layer: int
    rows: int
    right: int
    findings: list[Finding]

    def texts(self) -> list[str]:
        return [finding.text for finding in self.findings]


class _WrongBlock(NamedTuple):
    """What `side` holds in these places, and where the right rows are: with `right`, or nowhere but as digests in a
    ledger."""

    side: _Side
    right: _Side | None
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
        self._values = Counter[str]()
        """how many values are known to differ, by side"""
        self._read = lru_cache(maxsize=None)(_Side.rows)

    def diff(self, compared: Compared, moved: int) -> Diff:
        """All that was found, in order."""
        ordered = sorted(self._found, key=_order)
        verdict = unequal_text(compared, ordered, self._values) if ordered else equal_text(compared)
        return Diff(verdict, tuple(ordered), moved, self._rows, self._unfetched)

    def add_lengths(self, sides: Sequence[tuple[Held, Sequence[Held]]], layers: Sequence[int]) -> None:
        """Add a difference for each layer of a side that is too long or too short. With each side come others, of which
        one may hold the layer in its right length."""
        wrong = list[_WrongLength]()
        for held, others in sides:
            for layer in layers:
                rows, right = held.held.rows[layer], held.due(layer)
                if rows == right:
                    continue
                got = held.side.rows(layer, range(rows))
                whole = next((b.side for b in others if b.held.rows[layer] == b.due(layer)), None)
                findings = repeats(got, whole.rows(layer, range(right)) if whole else got)
                if findings:
                    cells = torch.stack([finding.cells for finding in findings]).any(0)
                    self._explained[held.side.name, layer] = cells
                wrong.append(_WrongLength(held.side, layer, rows, right, findings))
        for one in wrong:
            source = next((finding.source for finding in one.findings if finding.source is not None), None)
            place = next(
                (concerned(finding.cells)[0] for finding in one.findings if finding.cells.any()), None
            )
            at = source if source is not None else min(place or 0, one.right - 1)
            subject, rank = one.side.source.subject, one.side.rank
            chunk = subject.chunk_of(next((n for n, span in enumerate(subject.spans) if at in span), 0))
            op = "decode" if chunk is None else self._route.op(rank, chunk, one.layer)
            kinds = {finding.kind for finding in one.findings}
            ordered: tuple[RowKind, ...] = ("repeated", "missing", "shifted", "extra")
            self._found.append(
                Difference(
                    rank=rank, layer=one.layer, chunk=chunk, tensor=None, token=place,
                    op=op if chunk is None else f"after `{op}` in rank {rank}'s memory",
                    where="compute" if chunk is None else "memory",
                    kind=next((k for k in ordered if k in kinds), "extra" if one.rows > one.right else "missing"),
                    rows=abs(one.rows - one.right), name=one.side.name, note=_length_text(one, wrong, len(sides)),
                )
            )  # fmt: skip

    def add_block(self, side: _Side, right: _Side | None, span: int, layer: int, origin: Origin) -> None:
        """Add the differences of a block that is wrong on `side`. `right`: a side that holds the right one, if any."""
        subject, places = side.source.subject, self._spans[span]
        got, want = self._read(side, layer, places), None
        if right:
            want = self._read(right, layer, places)
        elif subject.chunk_of(span) is not None:
            want = side.source.noted_rows(subject.plan.shape.owners[layer], span, layer)
        if want is None:
            block = _WrongBlock(side, right, span, layer, places, origin)
            self._add(block, None, note="no rank holds the right rows, and no ledger has their digests")
            return
        got, want = got[: len(want)], want[: len(got)]

        def nearby() -> Nearby:
            """The block before: its rows as they should be, or else as they are."""
            if not span:
                return Nearby(places.start, got[:0], None)
            before = self._spans[span - 1]
            return Nearby(before.start, self._read(right or side, layer, before), before.start)

        known = torch.zeros(got.shape, dtype=torch.bool)
        if (side.name, layer) in self._explained:  # that layer may end before the block does
            part = self._explained[side.name, layer][places.start :][: len(got)]
            known[: len(part)] = part
        zero = int(row_digests(torch.zeros(1, 1, 1, subject.head_dim, dtype=subject.dtype)))
        findings, left = identify(got, want, places.start, nearby, zero, known)
        block = _WrongBlock(side, right, span, layer, places[: len(got)], origin)
        for finding in findings:
            self._add_rows(block, finding)
        self._add_values(block, left)

    def _add_rows(self, block: _WrongBlock, finding: Finding) -> None:
        """Add rows that are other rows: one difference of K and one of V."""
        self._rows += int(finding.cells.sum())
        chunk = block.side.source.subject.chunk_of(block.span)
        where = f"layer {block.layer}, {'new tokens' if chunk is None else f'chunk {chunk}'}"
        for tensor in (0, 1):
            cells = finding.cells[:, tensor]
            if cells.any():
                heads = cells.any(0).nonzero().flatten().tolist()
                self._add(
                    block, concerned(cells)[0], tensor, heads[0] if len(heads) == 1 else None, kind=finding.kind,
                    rows=int(cells.sum()), note=f"{block.side.name}, {where}: {finding.text}",
                )  # fmt: skip

    def _add_values(self, block: _WrongBlock, left: Tensor) -> None:
        """Add rows of other values: a difference each if their values may be fetched, else one for each tensor."""
        self._rows += int(left.sum())
        side, right, rest = block.side, block.right, left.clone()
        why = 'no rank holds what was computed: run.compare("reference")'
        if right and all(one.source.has_values(block.layer) for one in (side, right)):
            fetched = concerned(left)[: self._limit]
            if self._limit is not None:
                self._limit -= len(fetched)
            if fetched:
                self._add_fetched(block, right, fetched, left[fetched])
            rest[fetched] = False
            self._unfetched += int(rest.sum())
            why = ""
        elif right:
            why = "its values were not saved"
        for tensor in (0, 1):
            rows = rest[:, tensor].nonzero().tolist()
            if rows:
                more = f"and {len(rows) - 1} rows more of this block" if len(rows) > 1 else ""
                note = "; ".join(filter(None, [more, why]))
                self._add(block, rows[0][0], tensor, rows[0][1], rows=len(rows), note=note)

    def _add_fetched(self, block: _WrongBlock, right: _Side, places: Sequence[int], cells: Tensor) -> None:
        tokens = [block.places.start + n for n in places]
        mine, theirs = (one.source.values(one.rank, block.layer, tokens) for one in (block.side, right))
        differs = changed(mine, theirs)
        for n, tensor, head in cells.nonzero().tolist():
            dims = differs[n, tensor, head].nonzero().flatten().tolist()
            self._values[block.side.name] += len(dims)
            at = (n, tensor, head, dims[0]) if dims else None
            self._add(
                block, places[n], tensor, head, dim=dims[0] if dims else None,
                values=(float(mine[at]), float(theirs[at])) if at else None, count=len(dims),
            )  # fmt: skip

    def _add(
        self,
        block: _WrongBlock,
        place: int | None,
        tensor: int | None = None,
        head: int | None = None,
        **fields: Any,
    ) -> None:
        """`place`: in the block."""
        subject, origin = block.side.source.subject, block.origin
        token = None if place is None else block.places.start + place
        about: dict[str, Any] = {"kind": "value", **fields}
        self._found.append(
            Difference(
                rank=block.side.rank, layer=block.layer, chunk=subject.chunk_of(block.span),
                tensor=None if tensor is None else "KV"[tensor], head=head, token=token, op=origin.op,
                where=origin.where, hops=origin.hops, origin=origin.text, name=block.side.name,
                label=subject.label(token), dtype=subject.dtype, **about,
            )
        )  # fmt: skip


def _length_text(one: _WrongLength, wrong: Sequence[_WrongLength], sides: int) -> str:
    """For example `rank 0 holds 52 tokens of layer 0, the others 26; rows 26–51 repeat rows 0–25`."""
    texts = one.texts()
    alike = [
        other for other in wrong if (other.rows, other.right, other.texts()) == (one.rows, one.right, texts)
    ]
    names = {other.side.name for other in alike if other.layer == one.layer}
    layers = sorted({other.layer for other in alike if other.side.name == one.side.name})
    everyone = len(names) == sides > 1
    who = f"all {len(names)} ranks hold" if everyone else f"{one.side.name} holds"
    others = {other.side.name for other in wrong if other.layer == one.layer} - {one.side.name}
    right = f"it should be {one.right}" if everyone or others or sides == 1 else f"the others {one.right}"
    more = [f"and {len(texts) - 4} more such"] * (len(texts) > 4)
    which = f"layer{'s' * (len(layers) > 1)} {numbers_text(layers)}"
    return "; ".join([f"{who} {one.rows} tokens of {which}, {right}", *texts[:4], *more])


def _order(one: Difference) -> tuple[int, ...]:
    """Rows too many or too few come first, then rows that are other rows, then values."""
    kind = 0 if one.tensor is None else 1 + (one.kind == "value")
    chunk = one.chunk if one.chunk is not None else 1 << 30
    return (kind, chunk, one.layer, one.hops, one.rank, one.token or 0, one.tensor == "V", one.head or 0)

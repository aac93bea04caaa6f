"""Diff: where KV differs between the ranks of one source, or between two sources.

Lengths first, then digests of blocks; of blocks that differ, the digests of rows; of rows that differ, values. Whatever
is equal does not travel. Between the ranks of one source the right bytes of a block are those that were computed, as
its ledger tells; without one, those that most ranks hold, the owner's if no more do.
"""

from collections.abc import Sequence

from dinfer.plan.ops import PlanError
from dinfer.session.kv.among import Among
from dinfer.session.kv.between import cases_between, common_spans, good_other
from dinfer.session.kv.detail import Details
from dinfer.session.kv.difference import Diff, Difference
from dinfer.session.kv.origin import Way
from dinfer.session.kv.overlong import Overlong
from dinfer.session.kv.sides import Selection, blocks_of, shared_of
from dinfer.session.kv.source import Source
from dinfer.session.kv.verdict import Compared, equal_text, unequal_text

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
    overlong = Overlong(one.subject, [(b.side, b.held) for b in mine], chosen.layers, Way(one.subject.plan))
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

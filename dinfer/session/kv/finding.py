"""Finding: what comparing the KV of all ranks has shown, as the plain data that a report holds."""

from dinfer.session.kv.diff import diff_ranks
from dinfer.session.kv.difference import COLUMNS
from dinfer.session.kv.sides import Selection
from dinfer.session.kv.source import Source
from dinfer.trace.findings import Block, KvFinding

LISTED = 20
"""differences that a report lists"""


def kv_finding(source: Source) -> KvFinding:
    """Of all that the ranks hold. Raises PlanError where they have no block in common."""
    subject, ranks = source.subject, tuple(source.ranks)
    layers = tuple(range(subject.plan.shape.layers))
    diff = diff_ranks(source, Selection(ranks, layers, tuple(range(len(subject.spans)))), LISTED)
    wrong = {(one.rank, one.layer) for one in diff.differences}
    grid = tuple(
        tuple(_block((rank, layer) in wrong, held.spans[layer]) for layer in layers)
        for rank, held in zip(ranks, source.held(ranks), strict=True)
    )
    listed = diff.differences[:LISTED]
    return KvFinding(
        diff.equal, diff.verdict, grid, tuple(dict(zip(COLUMNS, one.cells(), strict=True)) for one in listed)
    )


def _block(is_wrong: bool, spans: int) -> Block:
    if is_wrong:
        return "differs"
    return "same" if spans else "missing"

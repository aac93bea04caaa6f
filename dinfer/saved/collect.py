"""Taking: what of a source's KV is to be saved, each thing once: what ranks hold alike comes from one of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.cluster.kv import Live
from dinfer.kv.digests import as_numbers, block_digests
from dinfer.kv.source import HeldSpans, Noted, Source
from dinfer.plan.plan import Plan
from dinfer.saved.format import LEDGER_COLUMNS, came_name, hidden_name, ledger_name, piece_name, rows_name


class Taken(NamedTuple):
    """Of some ranks: what they hold, and by rank and layer the digests of their rows; `tensors` are to be written."""

    held: dict[int, HeldSpans]
    rows: dict[tuple[int, int], Tensor]
    tensors: dict[str, Tensor]


def take_digests(source: Source, ranks: Sequence[int]) -> Taken:
    """The digests of all rows, and the ledgers."""
    layers = range(source.subject.plan.shape.layers)
    held = dict(zip(ranks, source.held(ranks), strict=True))
    rows = {
        (rank, layer): source.rows(rank, layer, range(held[rank].rows[layer]))
        for rank in ranks
        for layer in layers
    }
    tensors = dict[str, Tensor]()
    for (rank, layer), digests in rows.items():
        first = first_holder(source.subject.plan, ranks, layer)
        if rank == first or not torch.equal(digests, rows[first, layer]):
            tensors[rows_name(rank, layer)] = digests
    for rank, noted in zip(ranks, source.noted(ranks, layers), strict=True):
        tensors[ledger_name(rank)] = _ledger(noted)
        tensors |= _as_they_came(source, rank, noted, rows)
    return Taken(held, rows, tensors)


def take_layer(source: Source, taken: Taken, layer: int) -> dict[str, Tensor]:
    """The values of one layer: those of the first holder, and of other ranks what differs from them."""
    ranks, spans = list(taken.held), source.subject.spans
    first = first_holder(source.subject.plan, ranks, layer)
    right, found = taken.rows[first, layer], dict[str, Tensor]()
    for rank in ranks:
        mine = taken.rows[rank, layer]
        for piece in pieces(spans, len(mine)):
            at = slice(piece.start, piece.stop)
            if rank == first or not torch.equal(mine[at], right[at]):
                found[piece_name(rank, piece.start)] = source.values(rank, layer, piece)
    return found


def size_of(source: Source, taken: Taken, layers: Sequence[int]) -> int:
    """About how many bytes of values that will be: those of the first holders."""
    ranks = list(taken.held)
    rows = sum(len(taken.rows[first_holder(source.subject.plan, ranks, layer), layer]) for layer in layers)
    return rows * source.subject.row_nbytes


def take_hidden(source: Live, ranks: Sequence[int]) -> dict[str, Tensor]:
    """The hidden states that have entered these ranks."""
    return {
        hidden_name(rank, chunk, layer): source.hidden(rank, chunk, layer)
        for rank in ranks
        for chunk, layer in sorted(source.hidden_first(rank).items())
    }


def first_holder(plan: Plan, ranks: Sequence[int], layer: int) -> int:
    """The rank that others are said to equal in a layer: its owner, if that is one of these."""
    owner = plan.shape.owners[layer]
    return owner if owner in ranks else ranks[0]


def pieces(spans: Sequence[range], rows: int) -> list[range]:
    """A layer's places: those of each span, as far as there are so many, and those behind the last."""
    parts = [*spans, range(spans[-1].stop, max(rows, spans[-1].stop))]
    return [range(part.start, min(part.stop, rows)) for part in parts if part.start < min(part.stop, rows)]


def _ledger(noted: dict[tuple[int, int], Noted]) -> Tensor:
    lines = [
        [*key, int(one.edited), *map(_signed, (*one.came, *one.announced))]
        for key, one in sorted(noted.items())
    ]
    return torch.tensor(lines, dtype=torch.int64).reshape(-1, LEDGER_COLUMNS)


def _as_they_came(
    source: Source, rank: int, noted: dict[tuple[int, int], Noted], rows: dict[tuple[int, int], Tensor]
) -> dict[str, Tensor]:
    """The rows' digests of blocks that are no longer what they were."""
    found = dict[str, Tensor]()
    for (chunk, layer), one in noted.items():
        span = source.subject.spans[chunk]
        now = rows[rank, layer][span.start : span.stop]
        if one.came != as_numbers(block_digests(now)):
            came = source.noted_rows(rank, chunk, layer)
            found |= {} if came is None else {came_name(rank, layer, chunk): came}
    return found


def _signed(number: int) -> int:
    """64 bits as a number with a sign, as tensors have them."""
    return number - (1 << 64) if number >> 63 else number

"""Sides: what is to be compared, and what each side holds of it, as digests of blocks."""

from collections.abc import Sequence
from typing import NamedTuple

from dinfer.engine.ledger import Digests, Key
from dinfer.engine.probes import as_numbers
from dinfer.session.kv.detail import Side
from dinfer.session.kv.source import Held, Source


class Selection(NamedTuple):
    """What to compare; `spans` are indices into the subject's."""

    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    spans: tuple[int, ...]


class Blocks(NamedTuple):
    """What one side holds of the selection, and its digests by (span, layer), of those that are there."""

    side: Side
    held: Held
    now: dict[Key, Digests]


def blocks_of(
    source: Source, chosen: Selection, names: Sequence[str], spans: Sequence[range], *, by_rows: bool = False
) -> list[Blocks]:
    """What each rank holds. `by_rows`: the spans are another source's: those whose rows are there count."""
    held = source.held(chosen.ranks)
    digests = source.digests(chosen.ranks, chosen.layers, [spans[n] for n in chosen.spans])
    found = []
    for rank, name, has, numbers in zip(chosen.ranks, names, held, digests, strict=True):
        now = {
            (span, layer): as_numbers(numbers[i, j])
            for i, layer in enumerate(chosen.layers)
            for j, span in enumerate(chosen.spans)
            if spans[span]
            and (
                span < has.spans[layer]
                if not by_rows
                else spans[span].stop <= expected_rows(source, has, layer)
            )
        }
        found.append(Blocks(Side(source, rank, name), has, now))
    return found


def expected_rows(source: Source, held: Held, layer: int) -> int:
    """How many rows the spans have that a rank holds of a layer."""
    return source.subject.spans[held.spans[layer] - 1].stop if held.spans[layer] else 0


def shared_of(blocks: Sequence[Blocks], chosen: Selection, count: int) -> list[Key]:
    """The blocks that all sides hold, in the order in which they are computed."""
    keys = [(span, layer) for span in chosen.spans for layer in chosen.layers]
    return [key for key in keys if sum(key in one.now for one in blocks) == count]

"""Kept: what a run that is over still answers from, gathered before its ranks take another prompt.

Always the digests of all rows that its ranks held, in memory; with `keep=True` their values too, as a saved run in a
temporary folder.
"""

import shutil
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from dinfer.cluster.lease import RunOver
from dinfer.kv.digests import as_numbers, block_digests
from dinfer.kv.ledger import BlockKey
from dinfer.kv.source import HeldSpans, Noted, Source, Subject, ViewableSource
from dinfer.messages import Figures
from dinfer.saved.about import read_about
from dinfer.saved.format import first_holder
from dinfer.saved.read import read_source
from dinfer.saved.write import Content, write
from dinfer.temporary import new_folder

PREFIX = "dinfer-run-"


class KeptKv(NamedTuple):
    """The KV of a run that is over. `nbytes`: in memory, or in `folder`, which holds the values if they were kept; it
    is removed once nobody holds `source`. `sha256`: that of each rank's KV, where prefill was done and values were
    kept."""

    source: ViewableSource
    nbytes: int
    folder: Path | None = None
    sha256: tuple[str, ...] = ()


class KeptDigests(ViewableSource):
    """The digests of what `ranks` held: of rows, by rank and layer, and what their ledgers said. It has no values."""

    bytes_moved = 0

    def __init__(
        self,
        subject: Subject,
        held: dict[int, HeldSpans],
        rows: dict[tuple[int, int], Tensor],
        notes: dict[int, dict[BlockKey, Noted]],
        came: dict[tuple[int, BlockKey], Tensor],
    ) -> None:
        self.subject, self.ranks = subject, tuple(held)
        self._held, self._rows, self._notes, self._came = held, rows, notes, came

    @property
    def nbytes(self) -> int:
        """What alike ranks share is counted once."""
        return sum({id(one): one.nbytes for one in (*self._rows.values(), *self._came.values())}.values())

    def held(self, ranks: Sequence[int]) -> list[HeldSpans]:
        self._check(ranks)
        return [self._held[rank] for rank in ranks]

    def digests(self, ranks: Sequence[int], layers: Sequence[int], spans: Sequence[range]) -> list[Tensor]:
        self._check(ranks)

        def of(rank: int, layer: int) -> Tensor:
            return torch.stack([block_digests(self.rows(rank, layer, span)) for span in spans])

        return [torch.stack([of(rank, layer) for layer in layers]) for rank in ranks]

    def noted(self, ranks: Sequence[int], layers: Sequence[int]) -> list[dict[BlockKey, Noted]]:
        self._check(ranks)
        return [{key: one for key, one in self._notes[rank].items() if key[1] in layers} for rank in ranks]

    def noted_rows(self, rank: int, chunk: int, layer: int) -> Tensor | None:
        if (chunk, layer) not in self._notes[rank]:
            return None
        came = self._came.get((rank, (chunk, layer)))
        return self.rows(rank, layer, self.subject.spans[chunk]) if came is None else came

    def rows(self, rank: int, layer: int, places: range) -> Tensor:
        self._check([rank])
        return self._rows[rank, layer][places.start : places.stop]

    def has_values(self, layer: int) -> bool:  # noqa: ARG002
        return False

    def values(self, rank: int, layer: int, places: Sequence[int]) -> Tensor:  # noqa: ARG002
        raise self._lacks()

    def summary(self, rank: int, layer: int, places: range) -> Figures:  # noqa: ARG002
        raise self._lacks()

    def part(self, rank: int, layer: int, tensor: int, heads: Sequence[int], places: Sequence[int]) -> Tensor:  # noqa: ARG002
        raise self._lacks()

    def _lacks(self) -> RunOver:
        return RunOver(
            f"{self.subject.name} is over, and only digests were kept of its KV: session.prefill(…, keep=True) keeps "
            "the values of a run, too."
        )

    def _check(self, ranks: Sequence[int]) -> None:
        if missing := [rank for rank in ranks if rank not in self._held]:
            there = ", ".join(map(str, self._held)) or "no rank"
            raise RunOver(
                f"nothing was kept of rank {missing[0]} of {self.subject.name}: when it ended, {there} answered."
            )


def kept_digests(source: Source, ranks: Sequence[int]) -> KeptKv:
    """Gather the digests of what these ranks hold. Rows are fetched of the ranks that own their layers, and of others
    only where a block differs. Raises what the source raises."""
    subject, layers = source.subject, range(source.subject.plan.shape.layers)
    held = dict(zip(ranks, source.held(ranks), strict=True))
    blocks = dict(zip(ranks, source.digests(ranks, layers, subject.spans), strict=True))
    rows = dict[tuple[int, int], Tensor]()
    for layer in layers:
        first = first_holder(subject.plan, ranks, layer)
        for rank in sorted(ranks, key=lambda one: one != first):
            count, spans = held[rank].rows[layer], held[rank].spans[layer]
            is_alike = (
                rank != first
                and (count, spans) == (held[first].rows[layer], held[first].spans[layer])
                and count == subject.due(held[rank], layer)
                and torch.equal(blocks[rank][layer, :spans], blocks[first][layer, :spans])
            )
            rows[rank, layer] = rows[first, layer] if is_alike else source.rows(rank, layer, range(count))
    notes, came = (
        dict(zip(ranks, source.noted(ranks, layers), strict=True)),
        dict[tuple[int, BlockKey], Tensor](),
    )
    for rank, noted in notes.items():
        for (chunk, layer), one in noted.items():
            span = subject.spans[chunk]
            if one.came != as_numbers(block_digests(rows[rank, layer][span.start : span.stop])):
                found = source.noted_rows(rank, chunk, layer)
                came |= {} if found is None else {(rank, (chunk, layer)): found}
    kept = KeptDigests(subject, held, rows, notes, came)
    return KeptKv(kept, kept.nbytes)


def kept_values(content: Content, name: str) -> KeptKv:
    """Write a run with its values to a temporary folder, which goes with the source, or when this process ends; or, if
    it is killed, when the next one is made."""
    place, held = new_folder(PREFIX)
    folder = place / "kept"
    try:
        write(content, folder)
        source = read_source(folder, read_about(folder))
    except BaseException:
        _remove(place, held)
        raise
    source.subject = content.source.subject
    weakref.finalize(source, _remove, place, held)
    size = sum(one.stat().st_size for one in folder.iterdir())
    print(f"dinfer: {name} keeps its KV, {size_text(size)}, in {folder}", flush=True)
    return KeptKv(source, size, folder)


def _remove(place: Path, held: BinaryIO | None) -> None:
    with held or nullcontext():
        shutil.rmtree(place, ignore_errors=True)


def size_text(count: int) -> str:
    """For example 37 MiB, 4.6 MiB or 12 KiB."""
    if count < 1 << 20:
        return f"{count / (1 << 10):,.0f} KiB"
    size = count / (1 << 20)
    return f"{size:,.1f} MiB" if size < 10 else f"{size:,.0f} MiB"

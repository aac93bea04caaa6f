"""Source: whatever holds KV by rank and layer, and how it is read: a run's ranks, a saved folder, a reference.

A place is a row's index in a layer's cache: where all is well, the token that it is of. Digests are those of
`kv.digests`: of a row int64 [2, kv_heads], of a block int64 [2], the first index K and V. Nothing here compares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dinfer.kv.digests import as_numbers
from dinfer.kv.ledger import BlockKey, Digests
from dinfer.messages import Figures
from dinfer.plan.plan import Plan


@dataclass(frozen=True)
class Subject:
    """What a source is of.

    `ids`: the prompt, then the new tokens; `texts`: of each of them, in whole characters; `checkpoint`: its
    fingerprint; `name`: which run it is, for people; `standing`: by rank, where that stands, nothing if at its end.
    """

    name: str
    standing: tuple[str, ...]
    plan: Plan
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    checkpoint: str

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.plan.shape.tokens]

    @cached_property
    def spans(self) -> tuple[range, ...]:
        """The tokens of each chunk and then, where there are any, the new ones that have K and V: all but the last."""
        new = range(self.plan.shape.tokens, len(self.ids) - 1)
        return (*self.plan.shape.chunks, *([new] if new else []))

    @property
    def stands(self) -> str:
        """Where the run stands, for example `at c1 l2 on rank 0, before its first layer on rank 1`."""
        places = [f"{text} on rank {rank}" for rank, text in enumerate(self.standing) if text]
        return ", ".join(places) or "at its end"

    @property
    def row_nbytes(self) -> int:
        """The bytes of one row: K and V of one token in one layer, all heads."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class HeldSpans(NamedTuple):
    """What one rank holds, by layer: `spans`: how many of the subject's spans are there, counted from the first on;
    `rows`: how many rows, which may be more than these spans have, or fewer, where something is wrong."""

    spans: tuple[int, ...]
    rows: tuple[int, ...]


class Noted(NamedTuple):
    """What one rank's ledger says of a block: `came`, its digests when it was computed or had arrived there;
    `announced`, what its header said of it: the digests of who computed it; where it was computed, as `came`. `edited`:
    its user has changed it there since, and both are of what that has left."""

    came: Digests
    announced: Digests
    edited: bool = False


class Source(Protocol):
    """Calls for several ranks ask them together, and answer in their order. `chunk` counts the plan's chunks."""

    @property
    def subject(self) -> Subject: ...

    @property
    def ranks(self) -> Sequence[int]:
        """Those that it has something of."""

    @property
    def bytes_moved(self) -> int:
        """How much has been fetched so far, requests included."""

    def held(self, ranks: Sequence[int]) -> list[HeldSpans]:
        """What these ranks hold."""

    def digests(self, ranks: Sequence[int], layers: Sequence[int], spans: Sequence[range]) -> list[Tensor]:
        """Of the bytes as they are now in these places: int64 [layers, spans, 2] for each rank. Places that a rank does
        not hold do not count."""

    def noted(self, ranks: Sequence[int], layers: Sequence[int]) -> list[dict[BlockKey, Noted]]:
        """What the ranks' ledgers say of blocks of these layers, by chunk and layer; empty where none is kept."""

    def noted_rows(self, rank: int, chunk: int, layer: int) -> Tensor | None:
        """The rows' digests when the block was computed or had arrived, int64 [tokens, 2, kv_heads]; None where no
        ledger has them."""

    def rows(self, rank: int, layer: int, places: range) -> Tensor:
        """The rows' digests as they are now, int64 [places, 2, kv_heads]; fewer places where the rank holds fewer."""

    def values(self, rank: int, layer: int, places: Sequence[int]) -> Tensor:
        """The rows themselves, on the CPU: [places, 2, kv_heads, head_dim]. All places must be held."""

    def has_values(self, layer: int) -> bool:  # noqa: ARG002 - of most there are
        """Whether there are values of a layer, beside digests."""
        return True


class ViewableSource(Source, Protocol):
    """A source that can be looked at, too."""

    def summary(self, rank: int, layer: int, places: range) -> Figures:
        """K and V of these places by head: see `kv.measure`."""

    def part(self, rank: int, layer: int, tensor: int, heads: Sequence[int], places: Sequence[int]) -> Tensor:
        """K (0) or V (1) of some heads, [heads, places, head_dim]."""


@runtime_checkable
class LiveSource(ViewableSource, Protocol):
    """Ranks that stand: they can also tell what is not kept elsewhere."""

    def called(self, name: str) -> "LiveSource":
        """The same ranks under another name, to tell them from another run's."""

    def hidden_first(self, rank: int) -> dict[int, int]:
        """By chunk, the first layer before which a rank has its hidden state."""

    def hidden_summary(self, rank: int, chunk: int, layer: int) -> Figures:
        """Mean, deviation and extremes of the hidden state before a layer."""

    def hidden(self, rank: int, chunk: int, layer: int) -> Tensor:
        """The hidden state before a layer, [tokens, hidden_size]."""

    def attention(self, rank: int, chunk: int, layer: int, heads: Sequence[int]) -> tuple[Tensor, int]:
        """The weights of these heads, or of all if none is named, [heads, queries, keys]; the first key's token."""


class Side(NamedTuple):
    """One rank's KV; `name`: whose, for people."""

    source: Source
    rank: int
    name: str


def chunk_of(subject: Subject, span: int) -> int | None:
    """The chunk of that span; None for new tokens."""
    return span if span < len(subject.plan.shape.chunks) else None


class Selection(NamedTuple):
    """What to compare; `spans` are indices into the subject's."""

    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    spans: tuple[int, ...]


class HeldBlocks(NamedTuple):
    """What one side holds of the selection, and its digests by (span, layer), of those that are there."""

    side: Side
    held: HeldSpans
    now: dict[BlockKey, Digests]


def blocks_of(
    source: Source, chosen: Selection, names: Sequence[str], spans: Sequence[range], *, by_rows: bool = False
) -> list[HeldBlocks]:
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
        found.append(HeldBlocks(Side(source, rank, name), has, now))
    return found


def expected_rows(source: Source, held: HeldSpans, layer: int) -> int:
    """How many rows the spans have that a rank holds of a layer."""
    return source.subject.spans[held.spans[layer] - 1].stop if held.spans[layer] else 0


def shared_of(blocks: Sequence[HeldBlocks], chosen: Selection, count: int) -> list[BlockKey]:
    """The blocks that all sides hold, in the order in which they are computed."""
    keys = [(span, layer) for span in chosen.spans for layer in chosen.layers]
    return [key for key in keys if sum(key in one.now for one in blocks) == count]

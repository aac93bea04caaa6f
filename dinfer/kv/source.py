"""Source: what holds KV by rank and layer, and how it is read: a run's ranks, or a saved folder.

A place is a row's index in a layer's cache; where nothing is wrong, that is the token's number. Digests are those of
`kv.digests`: of a row int64 [2, kv_heads], of a block int64 [2], K before V. Nothing here compares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dinfer.kv.ledger import BlockKey, Digests
from dinfer.kv.rows import numbers_text
from dinfer.messages import Figures
from dinfer.plan.plan import Plan


class HeldSpans(NamedTuple):
    """What one rank holds, by layer. `spans`: how many of the subject's spans, counted from the first; `rows`: how many
    rows, which are more or fewer than those of the spans only if something is wrong."""

    spans: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """The run whose KV a source holds. `name`: what to call it in messages; `standing`: by rank, where it stands, "" at
    its end; `ids`: the prompt's tokens, then the new ones; `texts`: the text of each, in whole characters, empty
    without a tokenizer; `checkpoint`: the checkpoint's fingerprint; `codec`: of the run's blocks on the wire."""

    name: str
    standing: tuple[str, ...]
    plan: Plan
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    checkpoint: str
    codec: str = "none"

    @property
    def dtype_name(self) -> str:
        """For example "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.plan.shape.tokens]

    @cached_property
    def spans(self) -> tuple[range, ...]:
        """The tokens of each chunk and then, if there are any, the new tokens that have K and V: all but the last."""
        new = range(self.plan.shape.tokens, len(self.ids) - 1)
        return (*self.plan.shape.chunks, *([new] if new else []))

    def chunk_of(self, span: int) -> int | None:
        """The chunk that this span is; None if it is that of the new tokens."""
        return span if span < len(self.plan.shape.chunks) else None

    def due(self, held: HeldSpans, layer: int) -> int:
        """How many rows of a layer a rank should have, by the spans that it holds."""
        return self.spans[held.spans[layer] - 1].stop if held.spans[layer] else 0

    def label(self, token: int | None) -> str:
        """The token's text without spaces around it; empty where it is not known."""
        return "" if token is None or token >= len(self.texts) else self.texts[token].strip()

    @property
    def stands(self) -> str:
        """Where the run stands, for example `at c1 l2 on rank 0, before its first layer on ranks 1–2`."""
        ranks: dict[str, list[int]] = {}
        for rank, text in enumerate(self.standing):
            if text:
                ranks.setdefault(text, []).append(rank)
        return (
            ", ".join(
                f"{text} on rank{'s' * (len(some) > 1)} {numbers_text(some)}" for text, some in ranks.items()
            )
            or "at its end"
        )

    @property
    def row_nbytes(self) -> int:
        """The bytes of one row: K and V of one token in one layer, all heads."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class Noted(NamedTuple):
    """What one rank's ledger says of a block. `came`: its digests when it had been computed or received there;
    `announced`: those in its header, from the rank that computed it; there the same as `came`. `edited`: the user has
    changed the block there, and both are of the block after that."""

    came: Digests
    announced: Digests
    edited: bool = False


class Source(Protocol):
    """KV by rank and layer. `ranks`: those that can be asked; several are asked at once, and their answers come in
    their order."""

    subject: Subject
    ranks: Sequence[int]
    bytes_moved: int
    """bytes sent to and received from the ranks so far"""

    def held(self, ranks: Sequence[int]) -> list[HeldSpans]:
        """What these ranks hold."""

    def digests(self, ranks: Sequence[int], layers: Sequence[int], spans: Sequence[range]) -> list[Tensor]:
        """Of blocks as they are now: int64 [layers, spans, 2] for each rank; those of rows that a rank does not hold
        mean nothing."""

    def noted(self, ranks: Sequence[int], layers: Sequence[int]) -> list[dict[BlockKey, Noted]]:
        """What the ranks' ledgers say of blocks of these layers, by chunk and layer; empty without a ledger."""

    def noted_rows(self, rank: int, chunk: int, layer: int) -> Tensor | None:
        """The rows' digests when the block had been computed or received, int64 [tokens, 2, kv_heads], if known."""

    def rows(self, rank: int, layer: int, places: range) -> Tensor:
        """The rows' digests as they are now, int64 [places, 2, kv_heads], as far as the rank holds these places."""

    def values(self, rank: int, layer: int, places: Sequence[int]) -> Tensor:
        """The rows themselves, on the CPU: [places, 2, kv_heads, head_dim]. The rank must hold all of these places."""

    def has_values(self, layer: int) -> bool:  # noqa: ARG002 - most sources have all
        """Whether the values of a layer are available, and not only digests."""
        return True


class ViewableSource(Source, Protocol):
    """A source that users can look at."""

    def summary(self, rank: int, layer: int, places: range) -> Figures:
        """K and V of these places in figures by head: see `kv.measure.per_head`."""

    def part(self, rank: int, layer: int, tensor: int, heads: Sequence[int], places: Sequence[int]) -> Tensor:
        """K (0) or V (1) of some heads, [heads, places, head_dim]."""


@runtime_checkable
class LiveSource(ViewableSource, Protocol):
    """The ranks of a run, which can also be asked for what is not saved."""

    def hidden_first(self, rank: int) -> dict[int, int]:
        """By chunk, the first layer whose input, a hidden state, the rank has."""

    def hidden_summary(self, rank: int, chunk: int, layer: int) -> Figures:
        """The hidden state before a layer in figures, as of one head: see `kv.measure.per_head`."""

    def hidden(self, rank: int, chunk: int, layer: int) -> Tensor:
        """The hidden state before a layer, [tokens, hidden_size]."""

    def attention(self, rank: int, chunk: int, layer: int, heads: Sequence[int]) -> tuple[Tensor, int]:
        """The weights of these heads, or of all if none is named, [heads, queries, keys]; the first key's token."""


class Selection(NamedTuple):
    """What to compare; `spans` are indices into the subject's."""

    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    spans: tuple[int, ...]

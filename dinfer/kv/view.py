"""View: what `run.kv()` returns: who holds what, each head in a few figures, values on demand."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any, Protocol

import torch

from dinfer.display import Displayable, Table
from dinfer.errors import NoSuch
from dinfer.kv.diff import VALUES, diff_ranks, diff_sources
from dinfer.kv.difference import Diff, number_text
from dinfer.kv.measure import FIELDS
from dinfer.kv.rows import numbers_text
from dinfer.kv.source import Selection, Source, Subject, ViewableSource
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import within

LARGE = 64 << 20
"""before more bytes than this move, a message says how many"""

CORNER = 4
"""how many tokens, and values of each, are shown"""

NoteDiff = Callable[[Diff, Selection], None]

Hold = Callable[[], AbstractContextManager[None]]

_HOLDING_TWO = threading.Lock()
"""prevents a deadlock between A.diff(B) and B.diff(A)"""


class Other(Protocol):
    """What has KV to compare with: a run, or a saved one."""

    def source(self) -> Source: ...


class KV(Displayable):
    """What `run.kv` returns: the KV that ranks hold of a layer, a chunk, a rank, each None for all. `source()` is
    called anew for each look, since a run may have moved; `hold()` keeps the run from moving during one; `note(diff,
    selection)` is called after ranks were compared. Raises PlanError for an unknown layer, chunk or rank, and for a
    block that is not computed yet."""

    def __init__(
        self,
        source: Callable[[], ViewableSource],
        *,
        layer: int | None,
        chunk: int | None,
        rank: int | None,
        note: "NoteDiff | None" = None,
        hold: "Hold" = nullcontext,
    ) -> None:
        self.source, self._rank, self._note, self._hold = source, rank, note, hold
        self._spans = () if chunk is None else (chunk,)
        now = source()
        shape = now.subject.plan.shape
        layers = range(shape.layers) if layer is None else [within("layer", layer, shape.layers)]
        ranks = now.ranks if rank is None else [within("rank", rank, shape.world_size)]
        self._layers = tuple(layers)
        if chunk is not None:
            within("chunk", chunk, len(shape.chunks))
            for has in layers:
                check_computed(now, chunk, has, ranks)

    def diff(
        self,
        other: "Other | Source | None" = None,
        ranks: Sequence[int] | None = None,
        values: int | None = VALUES,
    ) -> Diff:
        """Where the ranks differ from one another or, given another run or a saved one, from that.

        Layers with too many rows or too few come first, then rows that are other rows, then values.

        `ranks`: which to compare, by default all; `values`: for how many tokens' rows to fetch the values, None: for
        all that differ. Raises PlanError for unknown ranks, and for a run of another prompt, model or dtype.
        """
        hold_other: Hold | None = getattr(other, "hold", None)
        with ExitStack() as held:
            with _HOLDING_TWO if hold_other else nullcontext():
                held.enter_context(self._hold())
                if hold_other:
                    held.enter_context(hold_other())
            source = self.source()
            subject = source.subject
            if ranks is not None:
                ranks = sorted({within("rank", rank, subject.plan.world_size) for rank in ranks})
                if not ranks:
                    raise PlanError(
                        "ranks is empty: name at least two, such as ranks=(0, 2), or leave it out for all."
                    )
            else:
                ranks = source.ranks if self._rank is None else [self._rank]
            spans = self._spans or tuple(range(len(subject.spans)))
            selection = Selection(tuple(ranks), self._layers, spans)
            if other is None:
                found = diff_ranks(source, selection, values)
                if self._note:
                    self._note(found, selection)
                return found
            theirs = other.source() if hasattr(other, "source") else other
            if theirs.subject.name == subject.name:  # both are live, and call themselves this run
                theirs = copy(theirs)
                theirs.subject = replace(theirs.subject, name="the other run")
            return diff_sources(source, theirs, selection, values)

    @property
    def k(self) -> "Part":
        """K of one layer: `[head, tokens]` fetches values, [heads, tokens, head_dim]."""
        return self._part(0)

    @property
    def v(self) -> "Part":
        """V of one layer, indexed in the same way."""
        return self._part(1)

    def summary(self) -> Table:
        """Each head of one layer in a few figures, on the chosen rank, or on the one that owns the layer."""
        with self._hold():
            source = self.source()
            figures = source.summary(*self._chosen(source))
            lines = [
                (tensor, head, *(f"{figures[name][n][head]:.4g}".replace("-", "−") for name in FIELDS))
                for n, tensor in enumerate("KV")
                for head in range(source.subject.kv_heads)
            ]
        return Table(("", "head", *FIELDS), lines)

    def __str__(self) -> str:
        with self._hold():
            source = self.source()
            subject, shape = source.subject, source.subject.plan.shape
            ranks = list(source.ranks) if self._rank is None else [self._rank]
            held = source.held(ranks)
            lines = [
                f"{subject.dtype_name}, K and V of each layer [{subject.kv_heads} heads, tokens, {subject.head_dim}]; "
                f"{len(subject.prompt)} tokens in {len(shape.chunks)} chunks; {subject.row_nbytes:,} bytes a token and "
                f"layer; layers {numbers_text(range(shape.layers))}"
            ]
            for layer in self._layers:
                by_rank = [
                    f"rank {rank} holds {has.rows[layer]}" for rank, has in zip(ranks, held, strict=True)
                ]
                lines.append(f"layer {layer} (of rank {shape.owners[layer]}), tokens: {', '.join(by_rank)}")
            if len(self._layers) == 1:
                lines += ["", str(self.summary()), "", *self._corner(subject)]
        return "\n".join(lines)

    def _corner(self, subject: Subject) -> list[str]:
        """The first values of the first tokens of K, and the tokens' texts."""
        part, lines = self.k, list[str]()
        few = part.places[:CORNER]
        if not len(few):
            return ["no tokens yet"]
        for token, row in zip(few, part[0, : len(few)], strict=True):
            label = f" {subject.label(token)!r}" if subject.label(token) else ""
            some = "  ".join(number_text(float(value), subject.dtype) for value in row[:CORNER])
            lines.append(f"K, head 0, token {token}{label}: {some}{'  …' if len(row) > CORNER else ''}")
        return lines

    def _part(self, tensor: int) -> "Part":
        with self._hold():
            source = self.source()
            return Part(source, tensor, *self._chosen(source), self._hold)

    def _chosen(self, source: Source) -> tuple[int, int, range]:
        """The chosen rank, or the one that owns the layer; the one layer; the rows of the chosen chunk that it holds,
        or all."""
        if len(self._layers) != 1:
            raise PlanError("name a layer: run.kv(layer=0) has K and V, and a summary of each head.")
        layer, rank, subject = self._layers[0], self._rank, source.subject
        if rank is None:
            owner = subject.plan.shape.owners[layer]
            rank = owner if owner in source.ranks else min(source.ranks)
        places = range(source.held([rank])[0].rows[layer])
        if self._spans:
            span = subject.spans[self._spans[0]]
            places = places[span.start : span.stop]
        return rank, layer, places


class Part(Displayable):
    """K or V of a layer on one rank, indexed as a tensor [heads, tokens, head_dim], which fetches values to the CPU.
    `places`: the rows that the second index counts."""

    def __init__(
        self,
        source: ViewableSource,
        tensor: int,
        rank: int,
        layer: int,
        places: range,
        hold: "Hold",
    ) -> None:
        self._source, self._rank, self._layer, self._tensor = source, rank, layer, tensor
        self.places, self._hold = places, hold

    @property
    def shape(self) -> tuple[int, int, int]:
        subject = self._source.subject
        return subject.kv_heads, len(self.places), subject.head_dim

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Ints, slices or lists, as for a tensor; a third index picks from head_dim. Raises IndexError for what is out
        of range, and for rows that are gone since the run went back."""
        given: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
        head, token, *rest = [*given, slice(None)][: max(2, len(given))]
        heads, tokens = _picked(head, self.shape[0], "head"), _picked(token, self.shape[1], "token")
        size = len(heads) * len(tokens) * self._source.subject.head_dim * self._source.subject.dtype.itemsize
        say_size(size, "a slice of heads or tokens, such as .k[0, :100], takes less")
        places = [self.places[n] for n in tokens]
        with self._hold():
            rows = self._source.held([self._rank])[0].rows[self._layer]
            if max(places, default=-1) >= rows:
                raise NoSuch(
                    f"rank {self._rank} now holds {rows} tokens of layer {self._layer}, fewer than when this was made, "
                    f"since the run has gone back: call run.kv(layer={self._layer}) again."
                )
            found = self._source.part(self._rank, self._layer, self._tensor, heads, places)
        found = found[:, 0] if isinstance(token, int) else found
        found = found[0] if isinstance(head, int) else found
        return found[(..., *rest)] if rest else found

    def __str__(self) -> str:
        name, (heads, tokens, dims) = "KV"[self._tensor], self.shape
        return (
            f"{name} of layer {self._layer} on rank {self._rank}: {heads} heads × {tokens} tokens × {dims}; "
            f"[head, tokens] fetches values"
        )


def check_computed(source: Source, chunk: int, layer: int, ranks: Sequence[int]) -> None:
    """Raises PlanError if none of these ranks holds the block yet."""
    if all(chunk >= held.spans[layer] for held in source.held(ranks)):
        on = f" on rank {ranks[0]}" if len(ranks) == 1 < source.subject.plan.world_size else ""
        what = "is not there" if on else "is not computed"
        raise PlanError(
            f"chunk {chunk} of layer {layer} {what} yet{on}; the run stands {source.subject.stands}."
        )


def say_size(size: int, advice: str) -> None:
    """Print how many bytes are about to move, if they are many."""
    if size > LARGE:
        print(f"dinfer: fetching {size / (1 << 20):,.0f} MiB; {advice}.", flush=True)


def _picked(index: Any, size: int, what: str) -> list[int]:
    if isinstance(index, slice):
        return list(range(size))[index]
    if isinstance(index, int) and -size <= index < size:
        return [index % size]
    if isinstance(index, (list, range)):
        return [_picked(one, size, what)[0] for one in index]
    raise NoSuch(f"{what} {index!r} is out of range: there are {size}, 0 to {size - 1}.")

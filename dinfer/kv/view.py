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
    """The KV that ranks hold of some layers, chunks and ranks. `source()` is called anew for each look, since a run may
    have moved; `hold()` keeps the run from moving during one; `note(diff, selection)` is called after ranks were
    compared."""

    def __init__(
        self,
        source: Callable[[], ViewableSource],
        layers: Sequence[int],
        spans: Sequence[int],
        rank: int | None,
        note: "NoteDiff | None" = None,
        hold: "Hold" = nullcontext,
    ) -> None:
        self.source, self._note, self._hold = source, note, hold
        self._layers, self._spans, self._rank = tuple(layers), tuple(spans), rank

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
                ranks = _known_ranks(subject, ranks)
            else:
                ranks = source.ranks if self._rank is None else [self._rank]
            spans = self._spans or range(len(subject.spans))
            selection = Selection(tuple(ranks), self._layers, tuple(spans))
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
            return self._summary()

    def _summary(self) -> Table:
        layer, rank = self._one_layer(), self._one_rank()
        source = self.source()
        figures = source.summary(rank, layer, _places(source, self._spans, rank, layer))
        names = [name for name in figures if name not in ("id", "type", "rank")]
        lines = [
            (tensor, str(head), *(_figure(figures[name][n][head]) for name in names))
            for n, tensor in enumerate("KV")
            for head in range(source.subject.kv_heads)
        ]
        return Table(("", "head", *names), lines)

    def __str__(self) -> str:
        with self._hold():
            return self._text()

    def _text(self) -> str:
        source = self.source()
        subject, ranks = source.subject, self._own_ranks(source)
        held = source.held(ranks)
        lines = [_shape_text(subject)]
        for layer in self._layers:
            by_rank = [f"rank {rank} holds {has.rows[layer]}" for rank, has in zip(ranks, held, strict=True)]
            owner = subject.plan.shape.owners[layer]
            lines.append(f"layer {layer} (of rank {owner}), tokens: {', '.join(by_rank)}")
        if len(self._layers) == 1:
            lines += ["", str(self.summary()), "", *self._corner()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return super()._repr_html_()

    def _corner(self) -> list[str]:
        """The first values of the first tokens of K, and the tokens' texts."""
        part, lines = self.k, list[str]()
        texts, dtype = self.source().subject.texts, self.source().subject.dtype
        few = part.places[:CORNER]
        if not len(few):
            return ["no tokens yet"]
        for token, row in zip(few, part[0, : len(few)], strict=True):
            label = f" {texts[token].strip()!r}" if token < len(texts) and texts[token].strip() else ""
            some = "  ".join(number_text(float(value), dtype) for value in row[:CORNER])
            lines.append(f"K, head 0, token {token}{label}: {some}{'  …' if len(row) > CORNER else ''}")
        return lines

    def _part(self, tensor: int) -> "Part":
        with self._hold():
            source, layer, rank = self.source(), self._one_layer(), self._one_rank()
            return Part(source, rank, layer, tensor, _places(source, self._spans, rank, layer), self._hold)

    def _one_layer(self) -> int:
        if len(self._layers) != 1:
            raise PlanError("name a layer: run.kv(layer=0) has K and V, and a summary of each head.")
        return self._layers[0]

    def _one_rank(self) -> int:
        """The chosen rank, or the one that owns the layer."""
        if self._rank is not None:
            return self._rank
        source = self.source()
        owner = source.subject.plan.shape.owners[self._layers[0]]
        return owner if owner in source.ranks else min(source.ranks)

    def _own_ranks(self, source: Source) -> list[int]:
        return list(source.ranks) if self._rank is None else [self._rank]


class Part(Displayable):
    """K or V of a layer on one rank, indexed as a tensor [heads, tokens, head_dim], which fetches values to the CPU.
    `places`: the rows that the second index counts."""

    def __init__(
        self,
        source: ViewableSource,
        rank: int,
        layer: int,
        tensor: int,
        places: range,
        hold: "Hold" = nullcontext,
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
            self._check_held(places)
            found = self._source.part(self._rank, self._layer, self._tensor, heads, places)
        found = found[:, 0] if isinstance(token, int) else found
        found = found[0] if isinstance(head, int) else found
        return found[(..., *rest)] if rest else found

    def _check_held(self, places: Sequence[int]) -> None:
        rows = self._source.held([self._rank])[0].rows[self._layer]
        if max(places, default=-1) >= rows:
            raise NoSuch(
                f"rank {self._rank} now holds {rows} tokens of layer {self._layer}, fewer than when this was made, "
                f"since the run has gone back: call run.kv(layer={self._layer}) again."
            )

    def __str__(self) -> str:
        name, (heads, tokens, dims) = "KV"[self._tensor], self.shape
        return (
            f"{name} of layer {self._layer} on rank {self._rank}: {heads} heads × {tokens} tokens × {dims}; "
            f"[head, tokens] fetches values"
        )


def kv_of(
    source: Callable[[], ViewableSource],
    *,
    layer: int | None,
    chunk: int | None,
    rank: int | None,
    note: NoteDiff | None = None,
    hold: Hold = nullcontext,
) -> KV:
    """What `run.kv` returns; `note` and `hold` as for `KV`. Raises PlanError for an unknown layer, chunk or rank, and
    for a block that is not computed yet."""
    now = source()
    shape = now.subject.plan.shape
    layers = range(shape.layers) if layer is None else [within("layer", layer, shape.layers)]
    ranks = now.ranks if rank is None else [within("rank", rank, shape.world_size)]
    if chunk is not None:
        within("chunk", chunk, len(shape.chunks))
        for has in layers:
            check_computed(now, chunk, has, list(ranks))
    return KV(source, list(layers), () if chunk is None else (chunk,), rank, note, hold)


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


def _known_ranks(subject: Subject, ranks: Sequence[int]) -> list[int]:
    found = sorted({within("rank", rank, subject.plan.world_size) for rank in ranks})
    if not found:
        raise PlanError("ranks is empty: name at least two, such as ranks=(0, 2), or leave it out for all.")
    return found


def _places(source: Source, spans: Sequence[int], rank: int, layer: int) -> range:
    """The rows of these spans, or all, that a rank holds."""
    rows = source.held([rank])[0].rows[layer]
    if not spans:
        return range(rows)
    span = source.subject.spans[spans[0]]
    return range(min(span.start, rows), min(span.stop, rows))


def _picked(index: Any, size: int, what: str) -> list[int]:
    if isinstance(index, slice):
        return list(range(size))[index]
    if isinstance(index, int) and -size <= index < size:
        return [index % size]
    if isinstance(index, (list, range)):
        return [_picked(one, size, what)[0] for one in index]
    raise NoSuch(f"{what} {index!r} is out of range: there are {size}, 0 to {size - 1}.")


def _shape_text(subject: Subject) -> str:
    dtype = str(subject.dtype).removeprefix("torch.")
    chunks = len(subject.plan.shape.chunks)
    return (
        f"{dtype}, K and V of each layer [{subject.kv_heads} heads, tokens, {subject.head_dim}]; "
        f"{len(subject.prompt)} tokens in {chunks} chunks; {subject.row_nbytes:,} bytes a token and layer; "
        f"layers {numbers_text(range(subject.plan.shape.layers))}"
    )


def _figure(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")

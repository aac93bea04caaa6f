"""View: what `run.kv()`, `run.hidden()` and `run.attention()` return: who holds what, values on demand."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dinfer.arguments import CallError
from dinfer.display import Composed, Displayable, Table, Tidy
from dinfer.errors import NoSuch, excerpt
from dinfer.kv.diff import VALUES, diff_ranks, diff_sources
from dinfer.kv.difference import Diff, number_text
from dinfer.kv.export import save_tensors, value_columns, value_rows
from dinfer.kv.measure import FIELDS
from dinfer.kv.rows import numbers_text
from dinfer.kv.source import LiveSource, Selection, Source, Subject, ViewableSource
from dinfer.plan.ops import NothingYet, PlanError
from dinfer.plan.partition import within
from dinfer.tabular import TableRow, Tabular

LARGE = 64 << 20
"""before more bytes than this move, a message says how many"""

CORNER = 4
"""how many tokens, and values of each, are shown"""

Hold = Callable[[], AbstractContextManager[None]]

_HOLDING_TWO = threading.Lock()
"""prevents a deadlock between A.diff(B) and B.diff(A)"""


class Other(Protocol):
    """What has KV to compare with: a run, or a saved one."""

    def source(self) -> Source: ...


class KV(Tidy, Tabular, Composed):
    """What `run.kv` returns: the KV that ranks hold of a layer, a chunk, a rank, each None for all.

    `.k[head, tokens]` and `.v[head, tokens]` fetch values of one layer, `.summary()` has each of its heads in a few
    figures, and `.diff()` finds where ranks differ.

    `source()` is called anew for each look, since a run may have moved; `hold()` keeps the run from moving during one;
    `note(diff, selection)` is called after ranks were compared; `remark(selection)` is what a comparison does not show,
    "" for nothing. Raises PlanError for an unknown layer, chunk or rank, and for a block that is not computed yet."""

    INTERNAL = frozenset({"source"})

    def __init__(
        self,
        source: Callable[[], ViewableSource],
        *,
        layer: int | None,
        chunk: int | None,
        rank: int | None,
        note: Callable[[Diff, Selection], None] | None = None,
        remark: Callable[[Selection], str] = lambda _: "",
        hold: "Hold" = nullcontext,
    ) -> None:
        self.source, self._rank, self._hold = source, rank, hold
        self._note, self._remark = note, remark
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
        if other is not None and not any(hasattr(other, name) for name in ("source", "subject")):
            raise CallError(
                f"other is {excerpt(other)}; it must be another run, or a saved one: dinfer.open(…) opens it. "
                'run.compare("reference") compares with transformers.'
            )
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
                remark = self._remark(selection)
                joint = "but" if found.equal else "and"
                return replace(found, verdict=f"{found.verdict}; {joint} {remark}") if remark else found
            theirs = other.source() if hasattr(other, "source") else other
            if isinstance(source, LiveSource) and isinstance(theirs, LiveSource):  # both are called this run
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

    def to_safetensors(self, path: str | Path) -> Path:
        """Write K and V of one layer as "k" and "v", [heads, tokens, head_dim], with where they are from as metadata;
        the path of the file, which is replaced. Raises PlanError where no layer is named, OSError."""
        with self._hold():
            return save_tensors(path, {"k": self.k[:], "v": self.v[:]}, self.k.about)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        """Of one layer, a row for each head and token of K and V."""
        with self._hold():
            k, v = self.k, self.v
            return value_columns(k.shape[2]), [*k.rows(), *v.rows()]

    def _parts(self) -> Iterable[str | Displayable]:
        with self._hold():
            source = self.source()
            subject, shape = source.subject, source.subject.plan.shape
            ranks = list(source.ranks) if self._rank is None else [self._rank]
            held = source.held(ranks)
            lines = [
                f"{subject.dtype_name}, K and V of each layer [{subject.kv_heads} heads, tokens, {subject.head_dim}]; "
                f"{shape.tokens_text}; {subject.row_nbytes:,} bytes a token and "
                f"layer; layers {numbers_text(range(shape.layers))}"
            ]
            for layer in self._layers:
                by_rank = [
                    f"rank {rank} holds {has.rows[layer]}" for rank, has in zip(ranks, held, strict=True)
                ]
                lines.append(f"layer {layer} (of rank {shape.owners[layer]}), tokens: {', '.join(by_rank)}")
            yield "\n".join(lines)
            if len(self._layers) == 1:
                yield self.summary()
                yield "\n".join(self._corner(subject))

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


class Part(Tidy, Tabular, Displayable):
    """K or V of a layer on one rank, indexed as a tensor [heads, tokens, head_dim], which fetches values to the CPU.
    `places`: the rows that the second index counts."""

    INTERNAL = frozenset({"about", "rows"})

    def __init__(
        self, source: ViewableSource, tensor: int, rank: int, layer: int, places: range, hold: "Hold"
    ) -> None:
        self._source, self._rank, self._layer, self._tensor = source, rank, layer, tensor
        self.places, self._hold = places, hold

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, tokens and values of each."""
        subject = self._source.subject
        return subject.kv_heads, len(self.places), subject.head_dim

    def __getitem__(self, index: Any) -> Tensor:
        """Ints, slices or lists, as for a tensor; a third index picks from head_dim. Raises IndexError for what is out
        of range, and for rows that are gone since the run went back."""
        given: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
        if len(given) > 3:
            raise NoSuch(f"K and V take at most 3 indices, [head, token, value]; got {len(given)}.")
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

    @property
    def about(self) -> dict[str, object]:
        """Where the values are from."""
        subject = self._source.subject
        first, end = (self.places[0], self.places[-1] + 1) if len(self.places) else (0, 0)
        return {
            "run": subject.name, "layer": self._layer, "rank": self._rank, "tokens": f"{first}:{end}",
            "checkpoint": subject.checkpoint,
        }  # fmt: skip

    def rows(self) -> Iterator[TableRow]:
        """A row for each head and token, all of them fetched: see `kv.export`."""
        return value_rows(self._source.subject, "KV"[self._tensor], self[:], self.places)

    def to_safetensors(self, path: str | Path) -> Path:
        """Write it as "k" or "v": see `KV.to_safetensors`."""
        return save_tensors(path, {"kv"[self._tensor]: self[:]}, self.about)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        return value_columns(self.shape[2]), self.rows()

    def __str__(self) -> str:
        name, (heads, tokens, dims) = "KV"[self._tensor], self.shape
        return (
            f"{name} of layer {self._layer} on rank {self._rank}: {heads} heads × {tokens} tokens × {dims}; "
            f"[head, tokens] fetches values"
        )


def check_computed(source: Source, chunk: int, layer: int, ranks: Sequence[int]) -> None:
    """Raises NothingYet if none of these ranks holds the block yet."""
    if all(chunk >= held.spans[layer] for held in source.held(ranks)):
        on = f" on rank {ranks[0]}" if len(ranks) == 1 < source.subject.plan.world_size else ""
        what = "is not there" if on else "is not computed"
        raise NothingYet(
            f"chunk {chunk} of layer {layer} {what} yet{on}; the run stands {source.subject.stands}."
        )


def say_size(size: int, advice: str) -> None:
    """Print how many bytes are about to move, if they are many."""
    if size > LARGE:
        print(f"dinfer: fetching {size / (1 << 20):,.0f} MiB; {advice}.", flush=True)


def _indexed(values: Tensor, index: Any, takes: str) -> Tensor:
    try:
        return values[index]
    except (IndexError, TypeError) as error:
        raise NoSuch(f"{excerpt(index)} picks nothing of {list(values.shape)} {takes}: {error}.") from None


def _picked(index: Any, size: int, what: str) -> list[int]:
    if isinstance(index, slice):
        return list(range(size))[index]
    if isinstance(index, int) and -size <= index < size:
        return [index % size]
    if isinstance(index, (list, range)):
        return [_picked(one, size, what)[0] for one in index]
    raise NoSuch(f"{what} {index!r} is out of range: there are {size}, 0 to {size - 1}.")


# -- hidden states and attention weights


TOP = 5
"""how many keys are shown of a query"""


class Hidden(Tidy, Tabular, Displayable):
    """What `run.hidden` returns: the hidden state of `chunk` before `layer`, [tokens, hidden_size], on `rank`; indexing
    fetches it to the CPU. `hold` keeps the run from moving while ranks are asked. Raises PlanError if the run has not
    come to it, or has gone back to before it meanwhile."""

    def __init__(self, source: Callable[[], LiveSource], chunk: int, layer: int, hold: Hold) -> None:
        self._source, self.chunk, self.layer, self._hold = source, chunk, layer, hold
        shape = source().subject.plan.shape
        within("chunk", chunk, len(shape.chunks))
        within("layer", layer, shape.layers + 1)
        self.rank = shape.owners[min(layer, shape.layers - 1)]
        self._checked_source()

    @cached_property
    def values(self) -> Tensor:
        """[tokens, hidden_size], on the CPU; fetched once."""
        with self._hold():
            return self._checked_source().hidden(self.rank, self.chunk, self.layer)

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens, and values of each."""
        return tuple(self.values.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return _indexed(self.values, index, "[token, value]")

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        """A row for each token, which has its number, its text and its values."""
        subject, values = self._source().subject, self.values
        rows = zip(subject.spans[self.chunk], values.tolist(), strict=True)
        columns = ["token", "text", *map(str, range(values.shape[1]))]
        return columns, ([token, subject.label(token), *row] for token, row in rows)

    def __str__(self) -> str:
        with self._hold():
            source = self._checked_source()
            found = source.hidden_summary(self.rank, self.chunk, self.layer)
        figures = ", ".join(f"{name} {found[name][0][0]:.4g}".replace("-", "−") for name in FIELDS)
        tokens = source.subject.spans[self.chunk]
        return (
            f"hidden c{self.chunk} l{self.layer} on rank {self.rank}: {source.subject.dtype_name}, "
            f"tokens {tokens.start}–{tokens.stop - 1}; {figures}"
        )

    def _checked_source(self) -> LiveSource:
        now = self._source()
        _check_hidden(now, self.rank, self.chunk, self.layer)
        return now


class AttentionWeights(Tidy, Tabular, Displayable, called="attention"):
    """The attention weights of the tokens of `chunk` in `layer`: `weights`, [heads, queries, keys], on the CPU. The
    first key is the token `first_key`. `heads` are attention heads; several may share one KV head."""

    def __init__(
        self, subject: Subject, layer: int, chunk: int, heads: Sequence[int], weights: Tensor, first_key: int
    ) -> None:
        self._subject, self.layer, self.chunk = subject, layer, chunk
        self.heads, self.weights, self.first_key = tuple(heads), weights, first_key

    def __getitem__(self, index: Any) -> Tensor:
        return _indexed(self.weights, index, "[head, query, key]")

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        """A row for each head, query and key, by their tokens' numbers."""
        keys = range(self.first_key, self.first_key + self.weights.shape[2])
        rows = (
            [head, query, key, self._subject.label(key), weight]
            for head, queries in zip(self.heads, self.weights.tolist(), strict=True)
            for query, weights in zip(self._subject.spans[self.chunk], queries, strict=True)
            for key, weight in zip(keys, weights, strict=True)
        )
        return ["head", "query", "key", "text of key", "weight"], rows

    def top(self, token: int, head: int | None = None, n: int = TOP) -> list[tuple[int, str, float]]:
        """The `n` tokens to which a token attends most, as (number, text, weight); of one head, or on average over all
        that were fetched. Raises PlanError for a token of another chunk."""
        rows = self._subject.spans[self.chunk]
        if token not in rows:
            raise PlanError(
                f"token {token} is not in chunk {self.chunk}, which has tokens {rows.start} to {rows.stop - 1}."
            )
        of_query = self.weights[:, token - rows.start].float()
        if head is not None and head not in self.heads:
            raise PlanError(
                f"the weights of head {head} are not here; those of {numbers_text(self.heads)} are."
            )
        weights = of_query.mean(0) if head is None else of_query[self.heads.index(head)]
        found = torch.topk(weights, min(n, len(weights)))
        tokens = (self.first_key + found.indices).tolist()
        texts = [self._subject.texts[n] if n < len(self._subject.texts) else "" for n in tokens]
        return list(zip(tokens, texts, found.values.tolist(), strict=True))

    def __str__(self) -> str:
        rows = self._subject.spans[self.chunk]
        which = f"head {self.heads[0]}" if len(self.heads) == 1 else f"{len(self.heads)} heads, on average"
        lines = [
            f"attention of layer {self.layer}, chunk {self.chunk}, {which}; the last tokens attend most to"
        ]
        for token in rows[-TOP:]:
            most = ", ".join(f"{self._name(key)} {weight:.3f}" for key, _, weight in self.top(token))
            lines.append(f"  {self._name(token)}: {most}")
        return "\n".join(lines)

    def _name(self, token: int) -> str:
        text = self._subject.label(token)
        return f"{token} {text!r}" if text else str(token)


def attention_of(
    source: Callable[[], LiveSource], layer: int, chunk: int, head: int | None
) -> AttentionWeights:
    """What `run.attention` returns. Raises PlanError."""
    now = source()
    shape = now.subject.plan.shape
    within("layer", layer, shape.layers)
    within("chunk", chunk, len(shape.chunks))
    rank = shape.owners[layer]
    check_computed(now, chunk, layer, [rank])
    _check_hidden(now, rank, chunk, layer)
    size = len(shape.chunks[chunk]) * shape.chunks[chunk].stop * now.subject.dtype.itemsize
    heads = [] if head is None else [head]
    say_size(size * now.subject.kv_heads * (not heads), "head=0 takes less")
    weights, first_key = now.attention(rank, chunk, layer, heads)
    return AttentionWeights(now.subject, layer, chunk, heads or range(len(weights)), weights, first_key)


def _check_hidden(source: LiveSource, rank: int, chunk: int, layer: int) -> None:
    """Raises NothingYet if the rank does not have that hidden state yet."""
    first = source.hidden_first(rank).get(chunk)
    computed = layer == 0 or source.held([rank])[0].spans[layer - 1] > chunk
    if first is None or first > layer or not (first == layer or computed):
        raise NothingYet(
            f"the hidden state of chunk {chunk} before layer {layer} is not computed yet; the run stands "
            f"{source.subject.stands}."
        )

"""Difference: what a diff has found, as values with a text for consoles and an HTML form for notebooks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dinfer.display import Composed, Displayable, Table, Tidy
from dinfer.kv.ledger import BlockKey
from dinfer.kv.measure import CellDifference
from dinfer.kv.origin import CausePlace
from dinfer.kv.rows import RowKind, numbers_text
from dinfer.kv.source import Selection, Subject
from dinfer.severity import Severity
from dinfer.tabular import TableRow, Tabular

SHOWN = 40
"""lines of a table"""

COLUMNS = ("rank", "layer", "chunk", "tensor", "head", "token", "dim", "values", "kind", "op")


@dataclass(frozen=True, kw_only=True)
class KvPlace(Tidy):
    """Where KV is not what it should be, as far as that is known: `rank`, `layer`, `chunk`. `tensor`: "K", "V" or,
    beside the reference, a hidden state; `head`, `token`, `dim`: the first that differs; `values`: what is there and
    what should be; `op`: the op at which it first differed, "" if that is not known."""

    rank: int
    layer: int
    chunk: int | None
    tensor: str | None
    head: int | None = None
    token: int | None = None
    dim: int | None = None
    values: tuple[float, float] | None = None
    op: str = ""

    def value_text(self, label: str, dtype: torch.dtype) -> str:
        """For example `head 3, token 141 ('Lima'), dim 17: 0.0312 against −1.75`; `label`: the token's text."""
        parts = [f"head {self.head}"] * (self.head is not None)
        if self.token is not None:
            parts.append(f"token {self.token}" + f" ({label!r})" * bool(label))
        parts += [f"dim {self.dim}"] * (self.dim is not None)
        values = " against ".join(number_text(value, dtype) for value in self.values or ())
        return ", ".join(parts) + f": {values}" * bool(values)


@dataclass(frozen=True, repr=False, kw_only=True)
class Difference(KvPlace, Displayable):
    """One row of one rank that is not what it should be: of K or V, of one token, and of one head where not all differ.

    Rows that have become other rows (`kind` is not "value") are one difference together: `token` is their first, and
    `rows` counts them by token and head. `count`: how many values of the row differ. `dim`, `values` and `count` are
    None where the values were not fetched, or no rank holds the right ones any more. `chunk` None: new tokens; `tensor`
    None: the layer has too many rows or too few. `where`: "wire", "memory" or "compute"; empty if that is not known.

    `name`: whose KV this is; `label`: the token's text; `note`: a sentence on rows that have become others, or a remark
    on values; `origin`: how the block came to differ; `hops`: how far it has come from the rank that computes it;
    `dtype`: of the values.
    """

    kind: RowKind
    where: CausePlace = ""
    rows: int = 1
    count: int | None = None
    name: str = ""
    label: str = ""
    note: str = ""
    origin: str = ""
    hops: int = 0
    dtype: torch.dtype = field(default=torch.float32)

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.text(), self.origin)))

    @property
    def has_nan(self) -> bool:
        """Whether one of its `values` is NaN or Inf."""
        return not all(map(math.isfinite, self.values or ()))

    def text(self) -> str:
        """What differs, without its origin."""
        if self.kind != "value":
            return self.note
        where = f"{self.name} differs at layer {self.layer}"
        parts = (where, self.tensor, self.value_text(self.label, self.dtype))
        return ", ".join(filter(None, parts)) + f" ({self.note})" * bool(self.note)

    def cells(self) -> tuple[str, ...]:
        """Its line of a table."""
        values = " ≠ ".join(number_text(value, self.dtype) for value in self.values or ())
        chunk = "new" if self.chunk is None and self.token is not None else self.chunk
        some = (
            self.rank,
            self.layer,
            chunk,
            self.tensor,
            self.head,
            self.token,
            self.dim,
            values,
            self.kind,
            self.op,
        )
        return tuple("" if one is None else str(one) for one in some)


@dataclass(frozen=True, repr=False)
class Diff(Tidy, Tabular, Composed):
    """What `diff()` returns. `verdict`: the first line. `differences`: first layers with too many rows or too few, then
    rows that are other rows, then values; each in the order in which blocks are computed, the rank where a difference
    began before those to which the block was passed on. `rows`: how many rows (token, K or V, head) differ;
    `unfetched`: how many of them whose values were not fetched; `bytes_moved`: between the ranks and here. `chosen`:
    whether all that differs follows from different codecs, which were chosen."""

    verdict: str
    differences: tuple[Difference, ...]
    bytes_moved: int
    rows: int = 0
    unfetched: int = 0
    chosen: bool = False

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    @property
    def severity(self) -> Severity:
        if self.equal:
            return Severity.OK
        return Severity.NOTE if self.chosen else Severity.ERROR

    @property
    def first(self) -> Difference | None:
        """The first of `differences`; None if there is none."""
        return self.differences[0] if self.differences else None

    def table(self, lines: int | None = SHOWN) -> Table:
        """A line for each difference, `lines` at most; None: all."""
        return Table(COLUMNS, [one.cells() for one in self.differences], lines)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        """`value`: what is there; `expected`: what should be."""
        own = (
            "rank",
            "layer",
            "chunk",
            "tensor",
            "head",
            "token",
            "label",
            "dim",
            "count",
            "kind",
            "where",
            "op",
        )
        rows = (
            [*(getattr(one, name) for name in own), *(one.values or (None, None)), one.origin]
            for one in self.differences
        )
        return [*own, "value", "expected", "origin"], rows

    def _parts(self) -> Iterable[str | Displayable]:
        yield "\n".join([self.verdict, *self._remarks()])
        if len(self.differences) > 1:
            yield self.table()

    def _remarks(self) -> list[str]:
        unfetched = (
            f"the values of {self.unfetched:,} of them were not fetched: diff(values=None) fetches all"
        )
        found = [f"{self.rows:,} rows (token, K or V, head) differ"] * (self.rows > 1)
        return found + [unfetched] * bool(self.unfetched)


def number_text(value: float, dtype: torch.dtype) -> str:
    """As few digits as tell it from every other number of that dtype."""
    if not math.isfinite(value):
        return str(value).replace("-", "−")
    exact = torch.tensor(value, dtype=dtype).item()
    for digits in range(1, 18):
        text = f"{value:.{digits}g}"
        if torch.tensor(float(text), dtype=dtype).item() == exact:
            break
    return text.replace("-", "−")


class Compared(NamedTuple):
    """What was compared: `blocks` are those that all sides hold, by span and layer; `other`: the name of the other
    source, if there is one."""

    subject: Subject
    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    blocks: tuple[BlockKey, ...]
    other: str = ""


def equal_text(compared: Compared) -> str:
    """For example `all 3 ranks hold the same 36 × 8 blocks, bit for bit`."""
    subject, ranks, (blocks, missing) = compared.subject, compared.ranks, _blocks_text(compared)
    if compared.other:
        return f"{subject.name} and {compared.other} hold the same {blocks}, bit for bit{missing}"
    if len(ranks) == 1:
        return f"rank {ranks[0]} holds {blocks} as they were made, bit for bit{missing}"
    if len(ranks) == subject.plan.world_size:
        who = f"all {len(ranks)} ranks" if len(ranks) > 2 else "both ranks"
    else:
        who = f"ranks {numbers_text(ranks) if len(ranks) > 2 else ' and '.join(map(str, ranks))}"
    return f"{who} hold the same {blocks}, bit for bit{missing}"


def unequal_text(compared: Compared, differences: Sequence[Difference], values: Mapping[str, int]) -> str:
    """The first difference in a sentence; of a value, how many of how many differ. Then the next one in another block,
    one with NaN or Inf before others, and how many more blocks there are."""
    first = differences[0]
    others = {(one.layer, one.chunk): one for one in reversed(differences)}
    others.pop((first.layer, first.chunk))
    text = _first_text(compared, differences, values)
    if not others or (first.chunk, first.tensor) == (None, None):
        return text
    second = next((one for one in reversed(others.values()) if one.has_nan), [*others.values()][-1])
    more = len(others) - 1
    rest = f"and {more} more block{'s' * (more > 1)}"
    return "; ".join([text, f"also {second.text()}", *[rest] * bool(more)])


def _first_text(compared: Compared, differences: Sequence[Difference], values: Mapping[str, int]) -> str:
    first = differences[0]
    if first.kind != "value" or first.values is None:
        return str(first)
    subject = compared.subject
    tokens = sum(len(subject.spans[span]) for span, _ in compared.blocks)
    some = "at least " if any(one.dim is None and one.name == first.name for one in differences) else ""
    total = f"{tokens * 2 * subject.kv_heads * subject.head_dim:,} values"
    return "; ".join(
        filter(None, (first.text(), f"{some}{values.get(first.name, 0):,} of {total}", first.origin))
    )


def nonfinite_remark(blocks: Iterable[BlockKey], chosen: Selection, text: str) -> str:
    """What a comparison does not show: how many of the blocks in it are among `blocks`, which hold NaN or Inf; "" for
    none. `text`: where they come from."""
    count = sum(chunk in chosen.spans and layer in chosen.layers for chunk, layer in blocks)
    return f"{count:,} of these blocks hold{'s' * (count == 1)} NaN or Inf: {text}" if count else ""


def loss_text(codec: str, by_tensor: Mapping[str, CellDifference]) -> str:
    """What a lossy codec changes, as far as it was measured, for example `K by up to 0.0312 (0.4 % of its largest
    value) and V by up to 0.0156 (0.4 %)`; "" for nothing."""
    parts = [
        f"{name} by up to {one.absolute:.3g} ({one.absolute / (one.scale or 1.0):.2%} of the largest value)"
        for name, one in by_tensor.items()
    ]
    amount = f": {' and '.join(parts)}" if parts else ""
    return f"codec {codec} has changed them by choice{amount}"


def _blocks_text(compared: Compared) -> tuple[str, str]:
    """How many blocks, and which of those asked for are not there yet."""
    chunks = len(compared.subject.plan.shape.chunks)
    prompt = [key for key in compared.blocks if key[0] < chunks]
    of_layers, of_chunks = len({layer for _, layer in prompt}), len({span for span, _ in prompt})
    whole = of_layers * of_chunks == len(prompt)
    text = f"{of_layers} × {of_chunks} blocks" if whole else f"{len(prompt)} blocks"
    if len(compared.blocks) > len(prompt):
        tokens = len(compared.subject.spans[chunks])
        text += f", and rows of {tokens} new token{'s' * (tokens > 1)}"
    missing = len(compared.layers) * chunks - len(prompt)
    if of_chunks < chunks and missing > 0 and not whole:
        return text, f" ({missing} are not on all of them yet)"
    return text, ""

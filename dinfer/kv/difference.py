"""Difference: what a diff has found, as values with a text for consoles and an HTML form for notebooks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

import torch

from dinfer.display import Displayable, Table
from dinfer.kv.ledger import BlockKey
from dinfer.kv.origin import CausePlace
from dinfer.kv.rows import RowKind, numbers_text
from dinfer.kv.source import Subject

SHOWN = 40
"""lines of a table"""

COLUMNS = ("rank", "layer", "chunk", "tensor", "head", "token", "dim", "values", "kind", "op")


@dataclass(frozen=True, kw_only=True)
class KvPlace:
    """Where KV is not what it should be, as far as that is known: down to one value.

    `tensor`: "K", "V" or, beside the reference, a hidden state; `head`, `token`, `dim`: the first that differs;
    `values`: what is there and what should be; `op`: the op at which it first differed, "" if that is not known.
    """

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
    on values; `origin`: how the block came to differ; `hops`: how far it has come from the rank that computes it.
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
        return "; ".join(part for part in (self.text(), self.origin) if part)

    def text(self) -> str:
        """What differs, without its origin."""
        if self.kind != "value":
            return self.note
        place = [
            f"{self.name} differs at layer {self.layer}",
            self.tensor,
            self.value_text(self.label, self.dtype),
        ]
        return ", ".join(part for part in place if part) + f" ({self.note})" * bool(self.note)

    def cells(self) -> tuple[str, ...]:
        """Its line of a table."""
        values = " ≠ ".join(number_text(value, self.dtype) for value in self.values or ())
        chunk = "new" if self.chunk is None and self.token is not None else self.chunk
        some = (self.rank, self.layer, chunk, self.tensor, self.head, self.token, self.dim)
        return (*("" if one is None else str(one) for one in some), values, self.kind, self.op)


@dataclass(frozen=True, repr=False)
class Diff(Displayable):
    """What `diff()` returns.

    `verdict`: the first line. `differences`: first layers with too many rows or too few, then rows that are other rows,
    then values; each in the order in which blocks are computed, the rank where a difference began before those to which
    the block was passed on. `rows`: how many rows (token, K or V, head) differ; `unfetched`: how many of them whose
    values were not fetched; `bytes_moved`: between the ranks and here.
    """

    verdict: str
    differences: tuple[Difference, ...]
    bytes_moved: int
    rows: int = 0
    unfetched: int = 0

    @property
    def equal(self) -> bool:
        return not self.differences

    @property
    def first(self) -> Difference | None:
        return self.differences[0] if self.differences else None

    def table(self, lines: int | None = SHOWN) -> Table:
        """A line for each difference, `lines` at most; None: all."""
        return Table(COLUMNS, [one.cells() for one in self.differences], lines)

    def __str__(self) -> str:
        lines = [self.verdict, *self._remarks()]
        return "\n".join([*lines, "", str(self.table())] if len(self.differences) > 1 else lines)

    def _repr_html_(self) -> str:
        lines = "<br>".join(map(escape, [self.verdict, *self._remarks()]))
        table = self.table()._repr_html_() if self.differences else ""
        return f'<div style="white-space:pre-wrap">{lines}</div>{table}'

    def _remarks(self) -> list[str]:
        if not self.differences:
            return []
        found = [f"{self.rows:,} rows (token, K or V, head) differ"] * (self.rows > 1)
        found += [
            f"the values of {self.unfetched:,} of them were not fetched: diff(values=None) fetches all"
        ] * bool(self.unfetched)
        return found


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

    @property
    def values(self) -> int:
        """How many values were compared on each rank."""
        tokens = sum(len(self.subject.spans[span]) for span, _ in self.blocks)
        return tokens * 2 * self.subject.kv_heads * self.subject.head_dim


def equal_text(compared: Compared) -> str:
    """For example `all 3 ranks hold the same 36 × 8 blocks, bit for bit`."""
    blocks, missing = _blocks_text(compared)
    if compared.other:
        return f"{compared.subject.name} and {compared.other} hold the same {blocks}, bit for bit{missing}"
    if len(compared.ranks) == 1:
        return f"rank {compared.ranks[0]} holds {blocks} as they were made, bit for bit{missing}"
    return f"{_who(compared)} hold the same {blocks}, bit for bit{missing}"


def unequal_text(compared: Compared, differences: Sequence[Difference], values: Mapping[str, int]) -> str:
    """The first difference in a sentence; of a value, how many of how many differ."""
    first = differences[0]
    if first.kind != "value" or first.values is None:
        return str(first)
    count = values.get(first.name, 0)
    some = "at least " if any(one.dim is None and one.name == first.name for one in differences) else ""
    total = f"{some}{count:,} of {compared.values:,} values"
    return "; ".join(part for part in (first.text(), total, first.origin) if part)


def _blocks_text(compared: Compared) -> tuple[str, str]:
    """How many blocks, and which of those asked for are not there yet."""
    chunks = len(compared.subject.plan.shape.chunks)
    prompt = [key for key in compared.blocks if key[0] < chunks]
    new = {span for span, _ in compared.blocks if span >= chunks}
    of_layers, of_chunks = len({layer for _, layer in prompt}), len({span for span, _ in prompt})
    whole = of_layers * of_chunks == len(prompt)
    text = f"{of_layers} × {of_chunks} blocks" if whole else f"{len(prompt)} blocks"
    if new:
        tokens = len(compared.subject.spans[chunks])
        text += f", and rows of {tokens} new token{'s' * (tokens > 1)}"
    asked = len(compared.layers) * chunks
    if of_chunks < chunks and len(prompt) < asked and not whole:
        return text, f" ({asked - len(prompt)} are not on all of them yet)"
    return text, ""


def _who(compared: Compared) -> str:
    ranks = compared.ranks
    if len(ranks) == compared.subject.plan.world_size:
        return f"all {len(ranks)} ranks" if len(ranks) > 2 else "both ranks"
    return f"ranks {numbers_text(ranks) if len(ranks) > 2 else ' and '.join(map(str, ranks))}"

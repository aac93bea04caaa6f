"""What must be said of a fault, worked out from the bytes before and after it and from nothing that dinfer says.

Exact means: rank, layer, chunk and tensor, the first head, token and, of values, dim that differ, how many, the kind
below, and the place and op of the fault itself. What no digest can tell is not asked for: the dim, where every rank
holds the wrong bytes, since the owner's memory changed before it sent (a reference tells it); and whether a row of
zeros was zeroed or never came (both are "empty"). Not a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinfer.engine.corruption import Corruption
from dinfer.kv.difference import Diff
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import STRATEGIES
from tests.support.broken import words
from tests.support.injections import Injection

Rows = Sequence[Sequence[Tensor]]
"""by rank and layer, what is held: [tokens, 2, kv_heads, head_dim]"""
KINDS = {
    "bitflip": "value", "nan": "value", "cast": "value", "zero": "empty", "lost": "empty", "stale": "stale",
    "swap_kv": "swapped", "permute": "permuted", "head_shift": "heads",
}  # fmt: skip
"""as which a diff names faults that change a block in its place"""


class Named(NamedTuple):
    """One Difference."""

    rank: int
    layer: int
    chunk: int | None
    tensor: str | None
    head: int | None
    token: int | None
    dim: int | None
    kind: str
    where: str
    op: str
    rows: int
    changed: int | None


class Spot(NamedTuple):
    """The first value of a tensor that differs."""

    tensor: str
    token: int
    head: int
    dim: int


def named(diff: Diff) -> list[Named]:
    """All that a diff says."""
    return [
        Named(
            one.rank, one.layer, one.chunk, one.tensor, one.head, one.token, one.dim, one.kind, one.where, one.op,
            one.rows, one.count,
        )
        for one in diff.differences
    ]  # fmt: skip


class Truth:
    """Of one fault. `before`: what the ranks hold after a clean run of the same prompt; `after`: with the fault."""

    def __init__(self, injected: Injection, plan: Plan, before: Rows, after: Rows) -> None:
        self._injected, self._plan = injected, plan
        self._rows = plan.shape.chunks[injected.chunk]
        self._itemsize = before[0][0].element_size()
        layer = injected.layer
        rows, next_rows = self._rows, slice(self._rows.start + 1, self._rows.stop + 1)
        after_block = after[injected.rank][layer][rows.start : rows.stop]
        self._is_shifted = torch.equal(after_block, before[injected.rank][layer][next_rows])
        self._changed = [self._of_rank(*both) for both in zip(before, after, strict=True)]

    @property
    def ranks(self) -> list[int]:
        """Those whose block is not that of the clean run."""
        return [rank for rank, changed in enumerate(self._changed) if changed.any()]

    @property
    def cause(self) -> str:
        """What a comparison says of it in compute: rows that are other rows are wrongly placed, whatever put them
        there. Positions off by one make equal tokens' rows in the first layer the next ones': the same bytes."""
        kind = self._injected.kind
        is_placed = kind in ("lost", "stale", "swap_kv", "permute", "head_shift")
        return "placement" if is_placed or (kind == "positions" and self._is_shifted) else "compute"

    def named(self) -> set[Named]:
        """The differences between ranks, of a fault in memory or on the wire."""
        if self._injected.kind == "append_twice":
            return {self._appended()}
        return {one for rank in self.ranks for one in self._of_block(rank)}

    def spot(self) -> Spot:
        """The first value of the fault's own rank that differs."""
        changed = self._changed[self._injected.rank]
        tensor = 0 if changed[:, 0].any() else 1
        token, head, dim = (int(n) for n in np.argwhere(changed[:, tensor])[0])
        return Spot("KV"[tensor], self._rows.start + token, head, dim)

    @property
    def op(self) -> str:
        """At which the bytes became others."""
        one, sources = self._injected, self._sources()
        block = f"c{one.chunk} l{one.layer}"
        op = f"recv kv {block} <- {sources[one.rank]}" if one.rank in sources else f"layer {block}"
        return op if one.where == "wire" else f"after `{op}` in rank {one.rank}'s memory"

    def arrived(self) -> list[Corruption]:
        """What ranks say when a block comes that is not what was computed: each names the first that got it so."""
        one, sources = self._injected, self._sources()
        wrong = [rank for rank in self.ranks if one.where == "wire" or rank != one.rank]
        found = []
        for rank in wrong:
            first = rank
            while sources[first] in wrong:
                first = sources[first]
            said = self._corruption(rank)
            found.append(replace(said, peer=sources[rank], first=None if first == rank else first))
        return found

    def in_memory(self) -> Corruption:
        """What the fault's own rank says before decode."""
        cells = np.argwhere(self._changed[self._injected.rank].any(-1))
        token, head = self._rows.start + int(cells[0][0]), int(cells[0][2])
        return replace(self._corruption(self._injected.rank), rows=len(cells), token=token, head=head)

    # -- within

    def _sources(self) -> dict[int, int]:
        """By rank, from whom it gets the block."""
        plan, owner = self._plan, self._plan.shape.owners[self._injected.layer]
        hops = STRATEGIES[plan.sync_strategy](owner, plan.world_size)  # type: ignore[index]
        return {target: source for source, target in hops}

    def _corruption(self, rank: int) -> Corruption:
        one, changed = self._injected, self._changed[rank]
        tensors = " and ".join(name for part, name in enumerate("KV") if changed[:, part].any())
        return Corruption(rank, one.chunk, one.layer, tensors, changed.size * self._itemsize)

    def _of_rank(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> np.ndarray:
        """Which values of the block differ: [tokens, 2, kv_heads, head_dim]."""
        layer, rows = self._injected.layer, slice(self._rows.start, self._rows.stop)
        differ: np.ndarray = words(before[layer][rows]) != words(after[layer][rows])
        return differ

    def _appended(self) -> Named:
        start, rows = self._rows.stop, len(self._rows)
        return self._difference(self._injected.rank, None, None, start, kind="repeated", rows=rows)

    def _of_block(self, rank: int) -> Iterator[Named]:
        kind = KINDS[self._injected.kind]
        nobody = len(self.ranks) == self._plan.world_size  # holds the right bytes any more
        for part, tensor in enumerate("KV"):
            values = self._changed[rank][:, part]
            cells = np.argwhere(values.any(-1))
            if kind == "value" and not nobody:
                for token, head in cells:
                    dims = np.flatnonzero(values[token, head])
                    yield self._at(rank, tensor, token, head, dim=int(dims[0]), count=len(dims))
            elif len(cells):
                token, head = cells[0]
                whole = kind != "value" and len(set(cells[:, 1])) > 1
                yield self._at(rank, tensor, token, None if whole else head, kind=kind, rows=len(cells))

    def _at(
        self, rank: int, tensor: str, token: int, head: int | None, *, dim: int | None = None,
        kind: str = "value", rows: int = 1, count: int | None = None,
    ) -> Named:  # fmt: skip
        place = None if head is None else int(head)
        at = self._rows.start + int(token)
        return self._difference(rank, tensor, place, at, dim=dim, kind=kind, rows=rows, count=count)

    def _difference(
        self, rank: int, tensor: str | None, head: int | None, token: int, *, dim: int | None = None,
        kind: str, rows: int, count: int | None = None,
    ) -> Named:  # fmt: skip
        one = self._injected
        return Named(
            rank, one.layer, one.chunk, tensor, head, token, dim, kind, one.where, self.op, rows, count
        )

"""A Source whose KV lies in this process, as random numbers, with a ledger, to be broken by tests. Not a test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.kv.ledger import UNKNOWN, BlockKey, LedgerEntry
from dinfer.kv.origin import BlockRoute
from dinfer.kv.source import HeldSpans, Noted, Source, Subject
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build

Change = Callable[[Tensor], None]
"""of a block [tokens, 2, heads, dims], in place"""


def plan_of(
    layers: int = 4, tokens: int = 10, world_size: int = 3, chunk_size: int = 4, strategy: str = "ring"
) -> Plan:
    shape = partition(layers=layers, tokens=tokens, world_size=world_size, chunk_size=chunk_size)
    return build(shape, "pipelined", strategy)  # type: ignore[arg-type]


def is_as_made(entry: LedgerEntry) -> bool:
    """Whether a block's bytes, when it was computed or received, were those that were computed."""
    return entry.announced in (None, UNKNOWN, as_numbers(entry.digests))


class HeldHere(Source):
    """`new`: how many new tokens there are; the last has no rows. Every rank has all rows, the same ones, until a test
    changes some: `kv[rank][layer]` is [rows, 2, heads, dims]."""

    def __init__(
        self, plan: Plan, *, heads: int = 2, dims: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0,
        new: int = 0, ledger: bool = True,
    ) -> None:  # fmt: skip
        tokens = plan.shape.tokens + new
        self.subject = Subject(
            name=f"run {seed}", standing=("",) * plan.world_size, plan=plan, ids=tuple(range(tokens)),
            texts=tuple(f"t{n}" for n in range(tokens)), kv_heads=heads, head_dim=dims, dtype=dtype, checkpoint="a",
        )  # fmt: skip
        rows, generator = plan.shape.tokens + max(0, new - 1), torch.Generator().manual_seed(seed)
        made = [
            torch.randn((rows, 2, heads, dims), generator=generator).to(dtype)
            for _ in range(plan.shape.layers)
        ]
        self.kv = {rank: [layer.clone() for layer in made] for rank in range(plan.world_size)}
        self.ranks = list(self.kv)
        self.spans = {rank: [len(self.subject.spans)] * plan.shape.layers for rank in self.kv}
        self.ledgers: dict[int, dict[BlockKey, tuple[Tensor, Noted]]] = {rank: {} for rank in self.kv}
        self.way, self.bytes_moved, self.fetched = BlockRoute(plan), 0, 0
        for rank in self.kv if ledger else ():
            for layer in range(plan.shape.layers):
                for chunk in range(len(plan.shape.chunks)):
                    self.note(rank, chunk, layer, None)

    # -- for tests

    def rename(self, **changes: object) -> None:
        self.subject = replace(self.subject, **changes)  # type: ignore[arg-type]

    def block(self, rank: int, chunk: int, layer: int) -> Tensor:
        span = self.subject.spans[chunk]
        return self.kv[rank][layer][span.start : span.stop]

    def note(self, rank: int, chunk: int, layer: int, announced: tuple[int, int] | None) -> None:
        """The ledger puts down what is there now; `announced` None: as much."""
        rows = row_digests(self.block(rank, chunk, layer))
        came = as_numbers(block_digests(rows))
        self.ledgers[rank][chunk, layer] = rows, Noted(came, announced or came)

    def wire(self, rank: int, chunk: int, layer: int, change: Change) -> list[int]:
        """The block changes on its way to this rank, which passes it on; the ranks that hold it so."""
        change(self.block(rank, chunk, layer))
        return self._pass_on(rank, chunk, layer, [rank])

    def before_sending(self, rank: int, chunk: int, layer: int, change: Change) -> list[int]:
        """The block changes in this rank's memory before it is passed on; the ranks that hold it so."""
        change(self.block(rank, chunk, layer))
        return self._pass_on(rank, chunk, layer, [])

    def _pass_on(self, rank: int, chunk: int, layer: int, noting: list[int]) -> list[int]:
        behind = [r for r in self.kv if rank in self.way.path(r, chunk, layer)]
        for other in behind:
            self.block(other, chunk, layer).copy_(self.block(rank, chunk, layer))
            if (other != rank or noting) and self.ledgers[other]:
                self.note(other, chunk, layer, self.ledgers[other][chunk, layer][1].announced)
        return sorted(behind, key=lambda r: (len(self.way.path(r, chunk, layer)), r))

    # -- Source

    def held(self, ranks: Sequence[int]) -> list[HeldSpans]:
        return [self._said(HeldSpans(tuple(self.spans[r]), tuple(map(len, self.kv[r])))) for r in ranks]

    def digests(self, ranks: Sequence[int], layers: Sequence[int], spans: Sequence[range]) -> list[Tensor]:
        return [
            torch.stack(
                [
                    torch.stack(
                        [block_digests(row_digests(self.kv[r][layer][s.start : s.stop])) for s in spans]
                    )
                    for layer in layers
                ]
            )
            for r in ranks
        ]

    def noted(self, ranks: Sequence[int], layers: Sequence[int]) -> list[dict[BlockKey, Noted]]:
        return [{key: said for key, (_, said) in self.ledgers[r].items() if key[1] in layers} for r in ranks]

    def noted_rows(self, rank: int, chunk: int, layer: int) -> Tensor | None:
        entry = self.ledgers[rank].get((chunk, layer))
        return entry[0] if entry else None

    def rows(self, rank: int, layer: int, places: range) -> Tensor:
        return row_digests(self.kv[rank][layer][places.start : places.stop])

    def values(self, rank: int, layer: int, places: Sequence[int]) -> Tensor:
        self.fetched += len(places)
        return self.kv[rank][layer][list(places)]

    def _said(self, held: HeldSpans) -> HeldSpans:
        self.bytes_moved += len(json.dumps(held))
        return held

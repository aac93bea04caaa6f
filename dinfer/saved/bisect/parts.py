"""Parts: what a run has made and what its answer hangs on, in the order in which it came to be.

A part is K or V of a block, or a hidden state that entered a rank, as one rank held it. Each follows from those before
it: (chunk, layer) by (chunk, layer), the hidden state before K and V, the owner's before another rank's copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dinfer.engine.faults import bits
from dinfer.kv.ledger import BlockKey
from dinfer.plan.plan import Plan

PartName = Literal["hidden", "K", "V"]

NAMES: tuple[PartName, ...] = ("hidden", "K", "V")


class RunPart(NamedTuple):
    """One part. `layer`: of a hidden state, the layer that it enters; behind the last, it is the normed hidden state of
    the prompt's last token, from which every rank decodes."""

    chunk: int
    layer: int
    name: PartName
    rank: int

    def __str__(self) -> str:
        """For example `K of block c1 l3 on rank 2`."""
        if self.name == "hidden":
            return f"the hidden state that enters c{self.chunk} l{self.layer} on rank {self.rank}"
        return f"{self.name} of block c{self.chunk} l{self.layer} on rank {self.rank}"


@dataclass(frozen=True, eq=False, kw_only=True)
class RunParts:
    """What one run has made, as its ranks held it at the end of prefill.

    `owned`: by layer, the rows of the rank that computed them, [tokens, 2, kv_heads, head_dim]; `rank`: the one whose
    answer this is, and `copies`: by chunk and layer, its blocks that are not as their owner's; `hidden`: by chunk and
    layer, what has entered a rank or was edited by hand, [1, tokens, hidden_size]; `final`: the normed hidden state of
    the last token, [1, 1, hidden_size], None if it was not recorded. `tokens`: the new tokens that the run made.
    """

    name: str
    plan: Plan
    tokens: tuple[int, ...]
    rank: int
    owned: Sequence[Tensor]
    copies: Mapping[BlockKey, Tensor] = field(default_factory=dict)
    hidden: Mapping[BlockKey, Tensor] = field(default_factory=dict)
    final: Tensor | None = None

    def get(self, part: RunPart, rows: range) -> Tensor | None:
        """That part, K or V as [tokens, kv_heads, head_dim]; None where it is not known. `rows`: its chunk's tokens. Of
        a rank of which no copy is known, it is the owner's."""
        if part.layer == len(self.owned):
            return self.final
        key = (part.chunk, part.layer)
        if part.name == "hidden":
            return self.hidden.get(key)
        block = self.owned[part.layer][rows.start : rows.stop]
        if part.rank != self.plan.shape.owners[part.layer] and part.rank == self.rank:
            block = self.copies.get(key, block)
        return block[:, NAMES.index(part.name) - 1]


def parts_of(run: RunParts) -> list[RunPart]:
    """All parts of a run, each before those that follow from it."""
    shape, found = run.plan.shape, list[RunPart]()
    for chunk in range(len(shape.chunks)):
        for layer, owner in enumerate(shape.owners):
            if (chunk, layer) in run.hidden:
                found.append(RunPart(chunk, layer, "hidden", owner))
            found += [RunPart(chunk, layer, "K", owner), RunPart(chunk, layer, "V", owner)]
            if (chunk, layer) in run.copies:
                found += [RunPart(chunk, layer, "K", run.rank), RunPart(chunk, layer, "V", run.rank)]
    if run.final is not None:
        found.append(RunPart(len(shape.chunks) - 1, shape.layers, "hidden", shape.owners[-1]))
    return found


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors hold the same bits. What is not known differs from nothing."""
    if one is None or other is None:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    mine, theirs = one.contiguous().cpu(), other.contiguous().cpu()
    return torch.equal(bits(mine), bits(theirs))

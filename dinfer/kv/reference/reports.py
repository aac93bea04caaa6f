"""Reports: what ranks send for a comparison with the reference, by block and tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import convert

from dinfer.kv.diff import held_blocks
from dinfer.kv.ledger import BlockKey, Digests
from dinfer.kv.measure import CellDifference
from dinfer.kv.rows import Misplaced
from dinfer.kv.source import Noted, Selection, Source
from dinfer.messages import HiddenDigests, ReferenceReport
from dinfer.model.tolerance import tolerance

FINAL = "final"
"""the normed hidden state of the prompt's last token; its layer is the number of layers and one"""


class TokenChoice(NamedTuple):
    """A new token that the reference would not have chosen after the same tokens. `position`: the new token's number;
    `gap`: by how much the logit of the reference's choice is larger."""

    position: int
    token: int
    reference: int
    gap: float


TensorKey = tuple[int, int, str]
"""chunk, layer, and one of: hidden, K, V, final"""

HIDDEN = ("hidden", FINAL)


class ToleranceMeasure(NamedTuple):
    """The tolerance within which values count as equal. `dtype`, `reference`: the dtypes of the run and the reference;
    `width` as in `model.tolerance.tolerance`; `step`: as a share of the largest value, how far apart two numbers of a
    lossy codec are, since rounding may make one the other."""

    exact: bool
    dtype: str
    reference: str
    width: int
    step: float = 0.0

    def share(self, layer: int, found: CellDifference) -> float:
        """The largest difference as a share of the tolerance; above 1 it is too large."""
        if self.exact:
            return float("inf") if found.changed else 0.0
        allowed = self.of(layer) * found.scale
        if found.nans[0] != found.nans[1]:
            return float("inf")
        return found.absolute / allowed if allowed else (float("inf") if found.absolute else 0.0)

    def of(self, layer: int) -> float:
        """The tolerance in a layer, as a share of the block's largest value."""
        return 0.0 if self.exact else tolerance(self.dtype, self.reference, layer, self.width) + self.step


def digest_at(
    blocks: Mapping[BlockKey, Digests], hidden: Mapping[BlockKey, int], key: TensorKey
) -> int | None:
    """The digest of one tensor among those of blocks and of hidden states."""
    chunk, layer, tensor = key
    if tensor in HIDDEN:
        return hidden.get((chunk, layer))
    found = blocks.get((chunk, layer))
    return found and found["KV".index(tensor)]


class ChosenLoss(NamedTuple):
    """What a lossy codec changes, beside the reference without it: by tensor, K and V of the prompt, and the logits of
    new tokens, each after the same tokens; the new tokens that it would not have chosen; of how many."""

    codec: str
    by_tensor: Mapping[str, CellDifference]
    choices: Sequence[TokenChoice]
    tokens: int

    def __str__(self) -> str:
        parts = [
            f"{name} by up to {found.absolute:.3g} ({found.absolute / (found.scale or 1.0):.2%} of the largest value)"
            for name, found in self.by_tensor.items()
        ]
        text = f"chosen loss, codec {self.codec}: {'; '.join(parts)}"
        if not self.tokens:
            return text
        if not self.choices:
            alike = "the new token is that" if self.tokens == 1 else f"all {self.tokens} new tokens are those"
            return f"{text}; {alike} of exact KV"
        one = self.choices[0]
        return (
            f"{text}; new tokens are those of exact KV up to number {one.position}, where it is {one.token} instead of "
            f"{one.reference}"
        )


class HeldDigests(NamedTuple):
    """What one rank holds: how many rows of each layer (`held`) and how many it should (`due`), the digests of blocks
    as they are `now`, what its ledger has `noted` of them, and those of `hidden` states."""

    rank: int
    held: tuple[int, ...]
    due: tuple[int, ...]
    now: dict[BlockKey, Digests]
    noted: dict[BlockKey, Noted]
    hidden: dict[BlockKey, int]


def helds_of(source: Source, hidden: Sequence[HiddenDigests]) -> list[HeldDigests]:
    """What a run's ranks hold, as a diff sees it; `hidden`: their answers to `DigestHidden`, which no source has."""
    ranks, layers = tuple(source.ranks), tuple(range(source.subject.plan.shape.layers))
    everything = Selection(ranks, layers, tuple(range(len(source.subject.spans))))
    blocks = held_blocks(source, source.held(ranks), everything, source.subject.spans)
    states = [{(chunk, layer): digest for chunk, layer, digest in one.digests} for one in hidden]
    return [
        HeldDigests(one.side.rank, one.held.rows, tuple(map(one.due, layers)), one.now, noted, kept)
        for one, noted, kept in zip(blocks, source.noted(ranks, layers), states, strict=True)
    ]


@dataclass
class Examined:
    """What a rank that has run the reference reports: how its own KV differs, and the reference's digests.

    `blocks`, `hidden`: the reference's digests, `hidden` the rank's own where bits may differ; `misplaced`: by layer;
    `measured`: by tensor.
    """

    rank: int
    report: ReferenceReport
    choices: list[TokenChoice]
    blocks: dict[BlockKey, Digests]
    hidden: dict[BlockKey, int]
    misplaced: dict[int, list[Misplaced]]
    measured: dict[TensorKey, CellDifference]

    def loss(self, codec: str, tokens: int) -> "ChosenLoss | None":
        """What the run's codec changes; None for one that changes nothing."""
        if not self.report.loss:
            return None
        by_tensor = convert(dict(self.report.loss), dict[str, CellDifference])
        return ChosenLoss(codec, by_tensor, convert(self.report.lost_choices, list[TokenChoice]), tokens)

    @classmethod
    def of(cls, rank: int, report: ReferenceReport) -> "Examined":
        misplaced = dict[int, list[Misplaced]]()
        for layer, one in convert(report.misplaced, tuple[tuple[int, Misplaced], ...]):
            misplaced.setdefault(layer, []).append(one)
        measured = convert(report.measured, tuple[tuple[int, int, str, CellDifference], ...])
        return cls(
            rank, report, convert(report.choices, list[TokenChoice]),
            {(chunk, layer): digests for chunk, layer, digests in report.blocks},
            {(chunk, layer): digest for chunk, layer, digest in report.hidden},
            misplaced, {(chunk, layer, tensor): found for chunk, layer, tensor, found in measured},
        )  # fmt: skip


def to_be_examined(helds: Sequence[HeldDigests], first: Examined) -> list[int]:
    """The ranks that must run the reference too: they hold other bytes than `first`, or than the reference."""
    known = helds[first.rank]
    blocks = first.blocks if first.report.exact else known.now
    found = []
    for one in helds:
        other = any(digests != blocks.get(block) for block, digests in one.now.items())
        other |= any(digest != first.hidden.get(block) for block, digest in one.hidden.items())
        if one.rank != first.rank and (other or one.held != known.held):
            found.append(one.rank)
    return found


def keys_of(helds: Sequence[HeldDigests], examined: Sequence[Examined]) -> list[TensorKey]:
    """All tensors that a rank holds, in the order in which a run computes them: what a fault hit comes before what it
    made wrong."""
    keys: set[TensorKey] = {(*block, name) for one in helds for block in one.now for name in "KV"}
    keys.update(key for one in examined for key in one.measured)
    return sorted(keys, key=lambda key: (*key[:2], ("hidden", FINAL, "K", "V").index(key[2])))

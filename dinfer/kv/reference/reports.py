"""What ranks tell for a comparison with the reference, by block, tensor and rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dinfer.kv.measure import CellDifference
from dinfer.kv.placement import Misplaced
from dinfer.messages import HeldReport, ReferenceReport
from dinfer.model.tolerance import tolerance

FINAL = "final"
"""the normed hidden state of the prompt's last token; its layer is the number of layers and one"""


class TokenChoice(NamedTuple):
    """A new token that the reference would not have chosen after the same tokens; `gap`: by how much its logit for
    its own is larger."""

    position: int
    token: int
    reference: int
    gap: float


Block = tuple[int, int]
"""chunk and layer"""

TensorKey = tuple[int, int, str]
"""chunk, layer and "hidden", "K", "V" or "final": in the order in which a run computes them"""

HIDDEN = ("hidden", FINAL)


class ToleranceMeasure(NamedTuple):
    """How far from the reference still is none; `width` as in `tolerance`."""

    exact: bool
    dtype: str
    reference: str
    width: int

    def share(self, layer: int, found: CellDifference) -> float:
        """The largest difference as a share of what is tolerated: above 1 it is too large."""
        if self.exact:
            return float("inf") if found.changed else 0.0
        allowed = self.of(layer) * found.scale
        if found.nans[0] != found.nans[1]:
            return float("inf")
        return found.absolute / allowed if allowed else (float("inf") if found.absolute else 0.0)

    def of(self, layer: int) -> float:
        return 0.0 if self.exact else tolerance(self.dtype, self.reference, layer, self.width)


@dataclass
class HeldDigests:
    """What one rank holds, in which dtype. Digests of K and V as they are `now`, as they were `then`, when they had
    been computed or had come, and as they were `announced`; `hidden`: those of the hidden states that are kept."""

    rank: int
    dtype: str
    held: list[int]
    due: list[int]
    tokens: list[int]
    now: dict[Block, tuple[int, int]] = field(default_factory=dict)
    then: dict[Block, tuple[int, int]] = field(default_factory=dict)
    announced: dict[Block, tuple[int, int]] = field(default_factory=dict)
    hidden: dict[Block, int] = field(default_factory=dict)

    @classmethod
    def of(cls, rank: int, report: HeldReport) -> "HeldDigests":
        lists = list(report.held), list(report.due), list(report.tokens)
        held = cls(rank, report.dtype, *lists, hidden=_by_block(report.hidden))
        for one in report.blocks:
            for where, digests in (
                (held.now, one.now),
                (held.then, one.then),
                (held.announced, one.announced),
            ):
                if digests:
                    where[one.chunk, one.layer] = digests
        return held


@dataclass
class Examined:
    """What a rank that has run the reference says: how what it holds differs, and the reference's digests."""

    rank: int
    exact: bool
    rows: int
    threads: int
    seconds: float
    device: str
    choices: list[TokenChoice]
    blocks: dict[Block, tuple[int, int]] = field(default_factory=dict)
    hidden: dict[Block, int] = field(default_factory=dict)
    misplaced: dict[int, list[Misplaced]] = field(default_factory=dict)
    measured: dict[TensorKey, CellDifference] = field(default_factory=dict)

    @classmethod
    def of(cls, rank: int, report: ReferenceReport) -> "Examined":
        found = cls(
            rank, report.exact, report.rows, report.threads, report.seconds, report.device,
            choices=[TokenChoice(*one) for one in report.choices],
            blocks={(one.chunk, one.layer): one.now for one in report.blocks},
            hidden=_by_block(report.hidden),
            measured={(c, n, tensor): CellDifference.of(list(its)) for c, n, tensor, its in report.measured},
        )  # fmt: skip
        for layer, one in report.misplaced:
            found.misplaced.setdefault(layer, []).append(Misplaced(*one))
        return found


def _by_block(digests: Sequence[tuple[int, int, int]]) -> dict[Block, int]:
    return {(chunk, layer): digest for chunk, layer, digest in digests}


def holds_most(helds: Sequence[HeldDigests]) -> int:
    """The rank to run the reference: most of what there is can be compared on it."""
    return max(helds, key=lambda one: (len(one.now), -one.rank)).rank


def to_be_examined(helds: Sequence[HeldDigests], first: Examined) -> list[int]:
    """The ranks that hold something of which `first` does not say how it differs from the reference."""
    known = helds[first.rank]
    found = []
    for one in helds:
        blocks = first.blocks if first.exact else known.now
        other = any(digests != blocks.get(block) for block, digests in one.now.items())
        other |= any(digest != first.hidden.get(block) for block, digest in one.hidden.items())
        if one.rank != first.rank and (other or one.held != known.held):
            found.append(one.rank)
    return found


def order_of(key: TensorKey) -> tuple[int, int, int]:
    """Sorts as a run computes: of all that one fault has made wrong, what it hit comes first."""
    chunk, layer, tensor = key
    return chunk, layer, ("hidden", FINAL, "K", "V").index(tensor)


def keys_of(helds: Sequence[HeldDigests], examined: Sequence[Examined]) -> Iterator[TensorKey]:
    """All that somebody holds, in order."""
    keys: set[TensorKey] = {(*block, name) for one in helds for block in one.now for name in "KV"}
    keys.update(key for one in examined for key in one.measured)
    yield from sorted(keys, key=order_of)

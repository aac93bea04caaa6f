"""Reports: what ranks send for a comparison with the reference, by block and tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dinfer.kv.ledger import BlockKey, Digests
from dinfer.kv.measure import CellDifference
from dinfer.kv.rows import Misplaced
from dinfer.kv.source import Noted
from dinfer.messages import Message
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
    `width` as in `model.tolerance.tolerance`."""

    exact: bool
    dtype: str
    reference: str
    width: int

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
        return 0.0 if self.exact else tolerance(self.dtype, self.reference, layer, self.width)


@dataclass
class HeldDigests:
    """What one rank holds: how many rows of each layer (`held`) and how many it should (`due`), the new `tokens`, the
    digests of blocks as they are `now`, what its ledger has `noted` of them, and those of `hidden` states."""

    rank: int
    dtype: str
    held: list[int]
    due: list[int]
    tokens: list[int]
    now: dict[BlockKey, Digests] = field(default_factory=dict)
    noted: dict[BlockKey, Noted] = field(default_factory=dict)
    hidden: dict[BlockKey, int] = field(default_factory=dict)

    @classmethod
    def of(cls, rank: int, answer: Message) -> "HeldDigests":
        """From a rank's answer to `reference_held`."""
        found = cls(rank, answer["dtype"], answer["held"], answer["due"], answer["tokens"])
        for name, chunk, layer, *rest in answer["items"]:
            if name == "hidden":
                found.hidden[chunk, layer] = rest[0]
                continue
            now, came, announced = (tuple(digests) if digests else None for digests in rest)
            if now:
                found.now[chunk, layer] = now
            if came:
                found.noted[chunk, layer] = Noted(came, announced if announced and any(announced) else came)
        return found


@dataclass
class Examined:
    """What a rank that has run the reference reports: how its own KV differs, and the reference's digests.

    `exact`: every bit should be equal; `rows`: how many tokens were fed; `blocks`, `hidden`: the reference's digests,
    `hidden` the rank's own where bits may differ; `misplaced`: by layer; `measured`: by tensor.
    """

    rank: int
    exact: bool
    rows: int
    threads: int
    seconds: float
    device: str
    choices: list[TokenChoice]
    blocks: dict[BlockKey, Digests] = field(default_factory=dict)
    hidden: dict[BlockKey, int] = field(default_factory=dict)
    misplaced: dict[int, list[Misplaced]] = field(default_factory=dict)
    measured: dict[TensorKey, CellDifference] = field(default_factory=dict)

    @classmethod
    def of(cls, rank: int, answer: Message) -> "Examined":
        """From a rank's answer to `reference`."""
        plain = {name: answer[name] for name in ("exact", "rows", "threads", "seconds", "device")}
        found = cls(rank=rank, **plain, choices=[TokenChoice(*one) for one in answer["choices"]])
        for name, *rest in answer["items"]:
            found._add(name, rest)
        return found

    def _add(self, name: str, rest: list[Any]) -> None:
        match name:
            case "kv":
                self.blocks[rest[0], rest[1]] = tuple(rest[2])
            case "hidden":
                self.hidden[rest[0], rest[1]] = rest[2]
            case "rows":
                self.misplaced.setdefault(rest[0], []).append(Misplaced(*rest[1:]))
            case "measured":
                self.measured[rest[0], rest[1], rest[2]] = CellDifference.of(rest[3:])


def holds_most(helds: Sequence[HeldDigests]) -> int:
    """The rank on which most blocks can be compared: it runs the reference first."""
    return max(helds, key=lambda one: (len(one.now), -one.rank)).rank


def to_be_examined(helds: Sequence[HeldDigests], first: Examined) -> list[int]:
    """The ranks that must run the reference too: they hold other bytes than `first`, or than the reference."""
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
    """A sort key for the order in which a run computes: what a fault hit comes before what it made wrong."""
    chunk, layer, tensor = key
    return chunk, layer, ("hidden", FINAL, "K", "V").index(tensor)


def keys_of(helds: Sequence[HeldDigests], examined: Sequence[Examined]) -> Iterator[TensorKey]:
    """All tensors that a rank holds, in the order in which a run computes them."""
    keys: set[TensorKey] = {(*block, name) for one in helds for block in one.now for name in "KV"}
    keys.update(key for one in examined for key in one.measured)
    yield from sorted(keys, key=order_of)

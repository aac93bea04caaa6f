"""What ranks tell for a comparison with the reference, by block, tensor and rank."""

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
    """A new token that the reference would not have chosen after the same tokens; `gap`: by how much its logit for
    its own is larger."""

    position: int
    token: int
    reference: int
    gap: float


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
    """What a rank that has run the reference says: how what it holds differs, and the reference's digests."""

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
    def of(cls, rank: int, said: Message) -> "Examined":
        plain = {name: said[name] for name in ("exact", "rows", "threads", "seconds", "device")}
        found = cls(rank=rank, **plain, choices=[TokenChoice(*one) for one in said["choices"]])
        for name, *rest in said["items"]:
            found._take(name, rest)
        return found

    def _take(self, name: str, rest: list[Any]) -> None:
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

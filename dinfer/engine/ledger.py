"""Ledger: what the bytes of each block were when they came to be on this rank, as digests.

The rank that computes a block digests it once; its digests travel in every header that announces the block, however
many hops it takes, and are compared with those of what has arrived. So a block whose bytes change is told from one
that was computed so, and the first place where they changed can be named.
"""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from dinfer.engine.probes import as_numbers, block_digests, row_digests

Key = tuple[int, int]
"""chunk and layer of a block"""
Digests = tuple[int, int]
"""of K and of V"""
UNKNOWN: Digests = (0, 0)
"""what a header holds where the ledger is not kept"""


class Entry(NamedTuple):
    """`rows`: the digest of each row, int64 [tokens, 2, kv_heads]; `digests`: the block's, int64 [2]; both of the
    bytes as they were computed or arrived here, where they live. `announced`: what the header said, those of who
    computed it."""

    rows: Tensor
    digests: Tensor
    announced: Digests | None = None

    @property
    def is_as_made(self) -> bool:
        """Whether these are the bytes that were computed. Waits for the device."""
        return self.announced in (None, UNKNOWN, as_numbers(self.digests))


class Ledger:
    """Of one prompt on one rank; every lane writes its own blocks. With `on` False nothing is kept."""

    def __init__(self, *, on: bool = True) -> None:
        self.on = on
        self.entries: dict[Key, Entry] = {}

    def made(self, key: Key, block: Tensor) -> None:
        """This rank has computed the block, [tokens, 2, kv_heads, head_dim]."""
        if self.on:
            self.entries[key] = _entry(block, None)

    def arrived(self, key: Key, block: Tensor, announced: Digests) -> Entry | None:
        """The block has come from a peer, announced with these digests."""
        if not self.on:
            return None
        entry = self.entries[key] = _entry(block, announced)
        return entry

    def announce(self, key: Key) -> Digests:
        """What a header says of the block: the digests of who computed it, whatever has become of it since."""
        entry = self.entries.get(key)
        if entry is None:
            return UNKNOWN
        return entry.announced or as_numbers(entry.digests)

    def keep(self, keys: Collection[Key]) -> None:
        """Only these blocks are still here."""
        self.entries = {key: entry for key, entry in self.entries.items() if key in keys}


def _entry(block: Tensor, announced: Digests | None) -> Entry:
    rows = row_digests(block)
    return Entry(rows, block_digests(rows), announced)

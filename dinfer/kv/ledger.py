"""Ledger: what the bytes of each block were when they came to be on this rank, as digests.

The rank that computes a block digests it once; its digests travel in every header that announces the block, however
many hops it takes, and are compared with those of what has arrived. So a block whose bytes change is told from one
that was computed so, and the first place where they changed can be named. Nothing here waits for a device, but for
`edited` and `changed`, and what is compared with a signature that lies on the host.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.kv.digests import as_numbers, block_digests, row_digests

BlockKey = tuple[int, int]
"""chunk and layer of a block"""

Digests = tuple[int, int]
"""of K and of V"""

UNKNOWN: Digests = (0, 0)
"""what a header holds where the ledger is not kept"""


class LedgerEntry(NamedTuple):
    """`rows`: the digest of each row, int64 [tokens, 2, kv_heads]; `digests`: the block's, int64 [2]; both of the bytes
    as they were computed or arrived here, or as the user has left them (`edited`), where they live. `signature`: of a
    block that has arrived, what its header said and what headers pass on, int64 [3]: see transfer."""

    rows: Tensor
    digests: Tensor
    signature: Tensor | None = None
    edited: bool = False

    @property
    def announced(self) -> Digests | None:
        """The digests of who computed the block, if another rank did. Waits for the device."""
        return None if self.signature is None else as_numbers(self.signature[:2])

    @property
    def is_as_made(self) -> bool:
        """Whether these are the bytes that were computed. Waits for the device."""
        return self.announced in (None, UNKNOWN, as_numbers(self.digests))


class Ledger:
    """Of one prompt on one rank; every lane writes its own blocks. With `on` False nothing is kept.

    `told`: blocks whose rows are known to have changed in memory since.
    """

    def __init__(self, rank: int, *, on: bool = True) -> None:
        self.rank, self.on = rank, on
        self.entries: dict[BlockKey, LedgerEntry] = {}
        self.told: set[BlockKey] = set()

    def made(self, key: BlockKey, block: Tensor) -> None:
        """This rank has computed the block, [tokens, 2, kv_heads, head_dim]."""
        if self.on:
            self._enter(key, _entry(block))

    def arrived(self, key: BlockKey, block: Tensor, announced: Tensor) -> Tensor | None:
        """The block has come from a peer, announced with this signature: its digests, where the signature is."""
        if not self.on:
            return None
        entry = _entry(block)
        found = entry.digests.to(announced.device)
        self._enter(key, entry._replace(signature=_passed_on(announced, found, self.rank)))
        return found

    def edited(self, key: BlockKey, block: Tensor) -> None:
        """The user may have changed the block: if so, its bytes are by intent what they are now."""
        before = self.entries.get(key)
        if before is None:
            return
        entry = _entry(block)
        if not torch.equal(entry.rows, before.rows):
            self._enter(key, entry._replace(edited=True))

    def signature(self, key: BlockKey) -> Tensor:
        """What a header says of the block, int64 [3]: the digests of who computed it, whatever has become of it since.
        Where the block lives, or where its own header lay."""
        entry = self.entries.get(key)
        if entry is None:
            return torch.zeros(3, dtype=torch.int64)
        if entry.signature is not None:
            return entry.signature
        return torch.cat([entry.digests, torch.zeros_like(entry.digests[:1])])

    def keep(self, keys: Collection[BlockKey]) -> None:
        """Only these blocks are still here."""
        self.entries = {key: entry for key, entry in self.entries.items() if key in keys}
        self.told &= set(keys)

    def changed(self, key: BlockKey, block: Tensor) -> Tensor:
        """The rows that are not what they were when they came to be here, as bool [tokens, 2, kv_heads]."""
        return row_digests(block) != self.entries[key].rows

    def _enter(self, key: BlockKey, entry: LedgerEntry) -> None:
        self.entries[key] = entry
        self.told.discard(key)


def _entry(block: Tensor) -> LedgerEntry:
    rows = row_digests(block)
    return LedgerEntry(rows, block_digests(rows))


def _passed_on(announced: Tensor, found: Tensor, rank: int) -> Tensor:
    """The signature for the next hop: it names the first rank at which other bytes have arrived."""
    differs = (announced[:2] != found).any() & (announced[:2] != 0).any() & (announced[2] == 0)
    return torch.cat([announced[:2], torch.where(differs, rank + 1, announced[2:])])

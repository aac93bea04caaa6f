"""Ledger: the digests of each block's bytes when it was computed or received on this rank.

The rank that computes a block digests it once. These digests travel in every header that announces the block, over all
its hops, and each receiver compares them with those of what has arrived. So a block whose bytes have changed can be
told from one that was computed wrong, and the first place where they changed can be named. Only `edited`, `changed`,
`LedgerEntry.announced` and the comparison with a signature on the host wait for a device.
"""

import threading
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.kv.digests import as_numbers, block_digests, row_digests

BlockKey = tuple[int, int]
"""chunk and layer of a block"""

Digests = tuple[int, int]
"""of K and of V, as unsigned numbers"""

UNKNOWN: Digests = (0, 0)
"""in a header, if no ledger is kept"""

PART_BYTES = 1 << 18
"""of a block whose digests are taken while the next message comes: some 0.2 ms of a CPU"""


class LedgerEntry(NamedTuple):
    """One block: `rows`, the digest of each row, int64 [tokens, 2, kv_heads], and `digests`, the block's, int64 [2], of
    the bytes that were computed or received or, if `edited`, that the user has left; on the block's device.

    `signature`: of a block that was received, what its header said and the next header says, int64 [3]: the digests of
    the rank that computed it, and the first rank that received other bytes, plus 1.
    """

    rows: Tensor
    digests: Tensor
    signature: Tensor | None = None
    edited: bool = False

    @property
    def announced(self) -> Digests | None:
        """The digests of the rank that computed the block, if it is another one. Waits for the device."""
        return None if self.signature is None else as_numbers(self.signature[:2])


class Ledger:
    """The ledger of one prompt on one rank; every lane writes its own blocks. With `on` False nothing is kept. `told`:
    blocks for which a change in memory has been reported."""

    def __init__(self, rank: int, *, on: bool = True) -> None:
        self.rank, self.on = rank, on
        self.kept: Callable[[BlockKey], LedgerEntry] | None = None
        """the entry of a block whose digests a graph has taken"""
        self._entries: dict[BlockKey, LedgerEntry] = {}
        self._by_graph: set[BlockKey] = set()
        self._lock = threading.Lock()
        """several lanes send what one has computed"""
        self.told: set[BlockKey] = set()

    @property
    def entries(self) -> dict[BlockKey, LedgerEntry]:
        """All entries, by block. Those of graphs are made only now: there are many, and few are looked at."""
        with self._lock:
            while self._by_graph:
                key = self._by_graph.pop()
                assert self.kept is not None
                self._entries[key] = self.kept(key)
        return self._entries

    def made_by_graph(self, key: BlockKey) -> None:
        """A graph has computed the block, and taken its digests."""
        with self._lock:
            self._entries.pop(key, None)
            self._by_graph.add(key)
        self.told.discard(key)

    def made(self, key: BlockKey, block: Tensor, *, edited: bool = False) -> None:
        """This rank has computed the block, [tokens, 2, kv_heads, head_dim], or the user has `edited` it."""
        if self.on:
            self._enter(key, _entry(block)._replace(edited=edited))

    def arrived(
        self, key: BlockKey, block: Tensor, announced: Tensor, meanwhile: Callable[[], None] | None = None
    ) -> Tensor | None:
        """This rank has received the block, announced with this signature. Returns its digests, on the signature's
        device; None if no ledger is kept. `meanwhile` is called after each part of the block."""
        if not self.on:
            return None
        entry = _entry(block, meanwhile)
        found = entry.digests.to(announced.device)
        self._enter(key, entry._replace(signature=self._passed_on(announced, found)))
        return found

    def _passed_on(self, announced: Tensor, found: Tensor) -> Tensor:
        """The signature for the next hop: it names the first rank at which other bytes have arrived."""
        if announced.device.type != "cpu":
            differs = (announced[:2] != found).any() & (announced[:2] != 0).any() & (announced[2] == 0)
            return torch.cat([announced[:2], torch.where(differs, self.rank + 1, announced[2:])])
        k, v, changed = announced.tolist()
        if changed or not (k or v) or [k, v] == found.tolist():
            return announced
        return torch.tensor([k, v, self.rank + 1])

    def edited(self, key: BlockKey, block: Tensor) -> bool:
        """The user may have changed the block. If so, its bytes are from now on what they should be. Returns whether
        it was so."""
        before = self.entries.get(key)
        if before is None:
            return False
        entry = _entry(block)
        if torch.equal(entry.rows, before.rows):
            return False
        self._enter(key, entry._replace(edited=True))
        return True

    def signature(self, key: BlockKey) -> Tensor:
        """What a header says of the block, int64 [3]: see `LedgerEntry`. It does not change with the block. It lies on
        the block's device, or on that of its own header."""
        entry = self.entries.get(key)
        if entry is None:
            return torch.zeros(3, dtype=torch.int64)
        if entry.signature is not None:
            return entry.signature
        return torch.cat([entry.digests, torch.zeros_like(entry.digests[:1])])

    def keep(self, keys: Collection[BlockKey]) -> None:
        """Forget all other blocks."""
        with self._lock:
            self._by_graph.intersection_update(keys)
            self._entries = {key: entry for key, entry in self._entries.items() if key in keys}
        self.told &= set(keys)

    def changed(self, key: BlockKey, block: Tensor) -> Tensor:
        """Which rows have changed since they were computed or received: bool [tokens, 2, kv_heads]."""
        return row_digests(block) != self.entries[key].rows

    def _enter(self, key: BlockKey, entry: LedgerEntry) -> None:
        with self._lock:
            self._by_graph.discard(key)
            self._entries[key] = entry
        self.told.discard(key)


def _entry(block: Tensor, meanwhile: Callable[[], None] | None = None) -> LedgerEntry:
    rows = row_digests(block) if meanwhile is None else _row_digests_in_parts(block, meanwhile)
    return LedgerEntry(rows, block_digests(rows))


def _row_digests_in_parts(block: Tensor, meanwhile: Callable[[], None]) -> Tensor:
    """`row_digests`, with a call after each PART_BYTES of the block."""
    found = []
    for part in torch.split(block, max(1, PART_BYTES // max(1, block[:1].nbytes))):
        found.append(row_digests(part))
        meanwhile()
    return torch.cat(found)

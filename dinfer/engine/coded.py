"""A prompt's blocks on one rank as they travel: encoded once for all sends, decoded on arrival, by the lanes of KV.

A lossy codec must not make ranks differ, and prefill must not compute on what it has lost. So the layers of this rank's
stage compute on KV of their own, and the cache gets what the other ranks get: each block is encoded when it is first
sent, or when somebody looks, and what it decodes to is written to the cache, where its digests are taken. The exact KV
is kept as long as the prompt, so that a run can go back. It takes the memory of one stage's KV once more.

The next block of this rank is encoded while one is on the wire, and the next message of a link comes while a block is
decoded and its digests are taken.
"""

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from dinfer.codec.choice import Codec, CodecError
from dinfer.codec.coding import decode, encode, size_of
from dinfer.engine.faults import Faults
from dinfer.kv.ledger import BlockKey, Ledger
from dinfer.model.cache import KVCache
from dinfer.plan.ops import Op, Value
from dinfer.plan.plan import Plan


class CodedState(Protocol):
    """What is used here of a prompt's state on one rank (`Prefill`)."""

    rank: int
    cache: KVCache
    plan: Plan
    ledger: Ledger
    faults: Faults

    def rows(self, chunk: int) -> range:
        """The token positions of a chunk."""

    def block(self, chunk: int, layer: int) -> Tensor:
        """The block in the cache, a view [tokens, 2, kv_heads, head_dim]."""


class CodedBlocks:
    """The blocks of one prompt on one rank; shared by its lanes. With codec `none` there is nothing to do.
    `codec`: of what this rank sends; `arriving`: of what it receives."""

    def __init__(self, state: CodedState, codec: Codec) -> None:
        self.codec = self.arriving = codec
        self._state = state
        own = [op for lane in state.plan.lanes[state.rank] for op in lane.ops if not codec.is_none]
        self._next = _successors(own)
        self._uses = _sends(own)
        """how often each block is still to be sent"""
        self._data: dict[BlockKey, Tensor] = {}
        self._made: set[BlockKey] = set()
        """the blocks that this rank has computed"""
        self._sealed: set[BlockKey] = set()
        """those of them for which the cache has what the codec makes of them"""
        self._edited: set[BlockKey] = set()
        self._lock = threading.RLock()
        self._ahead: ThreadPoolExecutor | None = None
        self._stage = _StageCache(state) if codec.is_lossy else None
        longest = max(state.plan.shape.chunks, key=len)
        self.most = largest_bytes(codec, state.cache.block(0, longest.start, longest.stop))
        """bytes that an encoded block of this prompt has at most"""

    @property
    def cache(self) -> KVCache:
        """What this rank's layers compute on."""
        return self._stage or self._state.cache

    def block(self, chunk: int, layer: int) -> Tensor:
        """The block that this rank computes, or has computed, as exactly as it was computed: a view."""
        rows = self._state.rows(chunk)
        return self.cache.block(layer, rows.start, rows.stop)

    # -- what this rank computes and sends

    def computed(self, key: BlockKey) -> bool:
        """A layer op has made the block. Returns whether its digests are taken later, of what the codec makes of it."""
        if self.codec.is_none:
            return False
        with self._lock:
            self._made.add(key)
            self._sealed.discard(key)
            self._edited.discard(key)
            self._data.pop(key, None)
        if self.codec.is_lossy and not self._uses[key]:  # no lane of KV will encode it
            self._seal(key)
        return self.codec.is_lossy

    def payload(self, key: BlockKey) -> Tensor:
        """The encoded block, uint8, for the next of its sends. What is sent after it is encoded meanwhile."""
        data = self._encoded(key)
        following = self._next.get(key)
        if following in self._made and following not in self._data:
            if self._ahead is None:
                # as a lane: torch's thread count is adopted when torch first asks for it
                self._ahead = ThreadPoolExecutor(1, f"rank {self._state.rank} encode", torch.get_num_threads)
            with suppress(RuntimeError):  # the prompt is being released
                self._ahead.submit(self._encoded_if_made, following)
        return data

    def sent(self, key: BlockKey) -> None:
        """One of its sends has ended."""
        if self.codec.is_none:
            return
        with self._lock:
            self._uses[key] -= 1
            # To encode a received block again would not give the same bytes: for going back these are kept.
            if self._uses[key] <= 0 and (key in self._made or not self.codec.is_lossy):
                self._data.pop(key, None)

    @property
    def has_unsealed(self) -> bool:
        """Whether the cache has a computed block as it was computed, and not as the other ranks get it."""
        return self.codec.is_lossy and not self._made <= self._sealed

    def seal_all(self) -> None:
        """Have the cache hold of all computed blocks what the other ranks get: somebody is about to look."""
        if self.codec.is_lossy:
            for key in sorted(self._made - self._sealed):
                self._seal(key)

    def _encoded_if_made(self, key: BlockKey) -> None:
        with self._lock:
            if key in self._made and self._uses[key] > 0:
                self._encoded(key)

    def _encoded(self, key: BlockKey) -> Tensor:
        data = self._data.get(key)
        if data is not None:
            return data
        with self._lock:
            if (data := self._data.get(key)) is None:
                data = self._seal(key) if self.codec.is_lossy and key in self._made else None
                data = encode(self.codec, self._state.block(*key)) if data is None else data
                self._data[key] = data
            return data

    def _seal(self, key: BlockKey) -> Tensor:
        """Encode a computed block, and have the cache hold what it decodes to. Returns the bytes."""
        with self._lock:
            data = encode(self.codec, self.block(*key))
            if key in self._sealed:
                return data
            block = self._state.block(*key)
            # `data` counts no version up, by which the user's edits are found: this is none
            decode(self.codec, data, block.data)
            self._state.ledger.made(key, block, edited=key in self._edited)
            if block.is_cuda:  # lanes read bytes and digests on streams of their own
                torch.cuda.current_stream(block.device).synchronize()
            self._sealed.add(key)
            self._state.faults.in_memory(Op("layer", *key), block.data)
            return data

    def made_here(self) -> list[BlockKey]:
        """The blocks that this rank has computed, in order; none with a codec that loses nothing."""
        return sorted(self._made) if self.codec.is_lossy else []

    # -- what this rank receives

    def arrived(self, key: BlockKey, data: Tensor, place: Tensor) -> None:
        """Decode a received block to its place in the cache. Bytes that are no block leave zeros there, which the
        digests of its header tell from it. Raises CodecError for such without digests."""
        try:
            decode(self.arriving, data, place)
        except CodecError:
            if not self._state.ledger.on:
                raise
            place.zero_()
        if self._uses[key] > 0 and self.arriving == self.codec:
            self._data[key] = data

    def changed(self, key: BlockKey) -> None:
        """The block in the cache is no longer what was received: what is sent on is."""
        self._data.pop(key, None)

    # -- by hand, and back

    def edited(self, key: BlockKey) -> None:
        """The user has changed the block in the cache: this rank computes with it, and sends what the codec makes of
        it, which it then holds itself."""
        if self.codec.is_none:
            return
        with self._lock:
            self._data.pop(key, None)
            if self.codec.is_lossy and key in self._made:
                self.block(*key).copy_(self._state.block(*key))
                if self._uses[key] > 0:
                    self._edited.add(key)
                    self._sealed.discard(key)

    def rewound(self, made: Collection[Value], todo: Iterable[Op]) -> None:
        """The rank has gone back: only these values are there, and these ops are ahead of it."""
        if self.codec.is_none:
            return
        with self._lock:
            here = {(value.chunk, value.layer) for value in made if value.what == "kv"}
            self._uses = _sends(todo)
            self._made &= here
            self._sealed &= here
            self._edited &= here
            self._data = {key: data for key, data in self._data.items() if key in here}

    def free(self) -> None:
        """Free the tensors."""
        if self._ahead is not None:
            self._ahead.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._made.clear()
            self._data.clear()
            self._stage = None


def largest_bytes(codec: Codec, block: Tensor) -> int:
    """The most bytes that the encoded block has; the very number if `codec.is_sized`."""
    return codec.largest(size_of(block))


class _StageCache(KVCache):
    """Of the layers of this rank's stage KV of its own; of the others the cache's, whichever that is by then."""

    def __init__(self, state: CodedState) -> None:
        cache = state.cache
        super().__init__(1, 1, cache.kv_heads, cache.head_dim, cache.dtype, cache.device)
        self._state, self.layers, self.capacity = state, cache.layers, cache.capacity
        self._own = {
            layer: torch.zeros_like(cache.tensor(layer)[: state.plan.shape.tokens])
            for layer in {
                op.layer for lane in state.plan.lanes[state.rank] for op in lane.ops if op.kind == "layer"
            }
        }

    def tensor(self, layer: int) -> Tensor:
        found = self._own.get(layer)
        return self._state.cache.tensor(layer) if found is None else found


def _sends(ops: Iterable[Op]) -> Counter[BlockKey]:
    return Counter((op.chunk, op.layer) for op in ops if op.kind == "send" and op.what == "kv")


def _successors(ops: Sequence[Op]) -> dict[BlockKey, BlockKey]:
    """By block that this rank computes, the one that it sends next."""
    own = {(op.chunk, op.layer) for op in ops if op.kind == "layer"}
    order = [key for key in _sends(ops) if key in own]  # in the order in which they are first sent
    return dict(pairwise(order))

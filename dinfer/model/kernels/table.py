"""LayerTable: where a run of tokens lies in each layer, on the device, where captured kernels read it."""

from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.model.cache import KVCache

COLUMNS = 7
"""position, slot, the addresses of KV, row digests, block digests and largest values (0: not kept), and the number of
tokens: a graph of more tokens computes the others too, but stores nothing of them"""

_POSITION, _SLOT, _TOKENS = 0, 1, 6


class Kept(NamedTuple):
    """What the kernels keep of each layer of one prompt, by row of its cache.

    `rows`, int64 [layers, capacity, 2, kv_heads]: digests of the rows of K and V. `blocks`, int64 [layers, slots, 2]:
    digests of K and of V of each block. `largest`, float32 [layers, capacity, 3]: of each token the largest absolute
    value of K, of V and of the hidden state after the layer, NaN where one of them is NaN. None: not kept.
    """

    rows: Tensor | None
    blocks: Tensor | None
    largest: Tensor | None

    @classmethod
    def of(cls, cache: KVCache, slots: int, *, digests: bool, largest: Tensor | None = None) -> "Kept":
        """New memory for a cache and so many blocks a layer."""
        if not digests:
            return cls(None, None, largest)
        rows = torch.zeros(
            (cache.layers, cache.capacity, 2, cache.kv_heads), dtype=torch.int64, device=cache.device
        )
        blocks = torch.zeros((cache.layers, slots, 2), dtype=torch.int64, device=cache.device)
        return cls(rows, blocks, largest)


class LayerTable:
    """One row of int64 a layer, see COLUMNS; `rows[layer]` is that row, [COLUMNS], a view."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.all = torch.zeros((layers, COLUMNS), dtype=torch.int64, device=device)
        self.rows = list(self.all)
        self._bound: tuple[KVCache, Kept | None] | None = None

    def bind(self, cache: KVCache, kept: Kept | None = None) -> bool:
        """Let the next runs write to this cache and keep what `kept` is for; both must outlive them. Returns False if
        that is so already."""
        if self._bound and self._bound[0] is cache and self._bound[1] is kept:
            return False
        self._bound = cache, kept
        tensors = (kept.rows, kept.blocks, kept.largest) if kept else (None, None, None)
        addresses = [
            [
                cache.tensor(layer).data_ptr(),
                *(0 if one is None else one[layer].data_ptr() for one in tensors),
            ]
            for layer in range(cache.layers)
        ]
        self.all[:, _SLOT + 1 : _TOKENS].copy_(torch.tensor(addresses, dtype=torch.int64))
        return True

    def unbind(self) -> None:
        """Keep no cache alive. `bind` must come before the next run."""
        self._bound = None

    def go_to(self, position: int, slot: int, tokens: int) -> None:
        """The next runs are of so many tokens from this row of the cache on; their blocks' digests go to this slot."""
        self.all[:, _POSITION].fill_(position)
        self.all[:, _SLOT].fill_(slot)
        self.all[:, _TOKENS].fill_(tokens)

    def advance(self) -> None:
        """Launch what moves the position by one token, for a graph of a new token."""
        self.all[:, _POSITION] += 1

    @property
    def position(self) -> Tensor:
        """The position, int64 [1], on the device."""
        return self.all[0, _POSITION : _POSITION + 1]

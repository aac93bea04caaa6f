"""Maps of any size, made without a plan, and how a browser reads what it is sent of one. Not a test."""

from __future__ import annotations

import numpy as np

from dinfer.views.cells import CellStates, held_states


def half_done(layers: int, chunks: int, ranks: int) -> CellStates:
    """A run of that size under way: each rank has fewer chunks of what other ranks compute, and of later layers."""
    layer, chunk, rank = np.ogrid[:layers, :chunks, :ranks]
    is_own = layer * ranks // layers == rank
    behind = chunks * (0.4 * layer / layers + np.where(is_own, 0, 0.02 + 0.02 * rank))
    return held_states(chunk < np.ceil(0.9 * chunks - behind))


def unpacked(sent: bytes, shape: tuple[int, ...]) -> CellStates:
    """As the browser reads it."""
    count = len(sent) // 5
    lengths = np.frombuffer(sent[: 4 * count], "<u4")
    flat = np.frombuffer(sent[4 * count :], np.uint8).repeat(lengths)
    layers, chunks, ranks = shape
    return flat.reshape(ranks, layers, chunks).transpose(1, 2, 0)

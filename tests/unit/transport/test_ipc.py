"""The memory that ranks on one GPU share: every count and every box has a place of its own, and all fit.

What streams do with it is tested on a GPU, in tests/gpu/test_ipc.py.
"""

from __future__ import annotations

from itertools import pairwise, permutations, product

import pytest
import torch

from dinfer.plan.graph import Channel
from dinfer.transport.header import HEADER_BYTES
from dinfer.transport.ipc import COMMUNICATORS, FEWEST, _SharedMemory, has_ipc


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("largest", [1, 4096, 655_360, 40 << 20])
def test_counts_and_boxes_do_not_overlap(world_size: int, largest: int) -> None:
    size = _SharedMemory.size(world_size, largest)
    views = [torch.empty(size, dtype=torch.uint8, device="meta") for _ in range(world_size)]
    # Tensors without memory: addresses are what counts. Each rank's begins at a number of its own.
    memory = _SharedMemory(0, views, largest)
    assert memory.boxes >= FEWEST
    channels = [
        Channel(name, *pair) for name, pair in product(COMMUNICATORS, permutations(range(world_size), 2))
    ]
    for rank in range(world_size):
        counts = [memory.taken(one) for one in channels if one.source == rank]
        counts += [memory.sent(one) for one in channels if one.target == rank]
        assert len(set(counts)) == len(counts)
        assert all(count % 4 == 0 for count in counts)
        taken = [(count, count + 4) for count in counts]
        for one in channels:
            if one.target == rank:
                for number in (1, 2, memory.boxes):
                    header, payload = memory.box(one, number)
                    assert (header.numel(), payload.numel()) == (HEADER_BYTES, largest)
                    taken += [
                        (part.storage_offset(), part.storage_offset() + part.numel())
                        for part in (header, payload)
                    ]
        taken.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(taken))
        assert not taken or taken[-1][1] <= size


def test_a_box_is_used_again_after_all_others() -> None:
    memory = _SharedMemory(0, [torch.empty(_SharedMemory.size(2, 100), dtype=torch.uint8)] * 2, 100)
    channel = Channel("kv", 1, 0)
    first = memory.box(channel, 1)[0].storage_offset()
    others = [memory.box(channel, number)[0].storage_offset() for number in range(2, memory.boxes + 1)]
    assert first not in others
    assert len(set(others)) == memory.boxes - 1
    assert memory.box(channel, memory.boxes + 1)[0].storage_offset() == first


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_there_is_none() -> None:
    assert not has_ipc()

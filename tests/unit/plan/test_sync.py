"""pairwise and ring: the hops of one block."""

from __future__ import annotations

import pytest

from dinfer.config import SyncStrategy
from dinfer.plan.schedule import STRATEGIES, pairwise, ring

SIZES = [(owner, world_size) for world_size in range(1, 17) for owner in range(world_size)]


def test_pairwise_by_hand() -> None:
    assert pairwise(1, 4) == [(1, 2), (1, 3), (1, 0)]


def test_ring_by_hand() -> None:
    assert ring(2, 4) == [(2, 3), (3, 0), (0, 1)]


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_one_rank_has_nobody_to_sync_with(strategy: SyncStrategy) -> None:
    assert STRATEGIES[strategy](0, 1) == []


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_every_rank_gets_the_block_once_from_one_that_has_it(strategy: SyncStrategy) -> None:
    for owner, world_size in SIZES:
        having = [owner]
        for source, target in STRATEGIES[strategy](owner, world_size):
            assert source in having
            assert target not in having
            having.append(target)
        assert sorted(having) == list(range(world_size))


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_the_kth_hops_of_all_owners_use_each_rank_once(strategy: SyncStrategy) -> None:
    for world_size in range(1, 17):
        by_owner = [STRATEGIES[strategy](owner, world_size) for owner in range(world_size)]
        for hops in zip(*by_owner, strict=True):
            assert sorted(source for source, _ in hops) == list(range(world_size))
            assert sorted(target for _, target in hops) == list(range(world_size))


def test_in_a_ring_all_send_to_the_right() -> None:
    assert all((a + 1) % n == b for owner, n in SIZES for a, b in ring(owner, n))

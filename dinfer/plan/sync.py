"""Sync strategies: the hops that take one block from its owner to every other rank."""

from collections.abc import Callable

from dinfer.config import SyncStrategy

Hop = tuple[int, int]
"""(source rank, destination rank)"""


def pairwise(owner: int, world_size: int) -> list[Hop]:
    """The owner sends to each other rank itself, beginning with its right-hand neighbour.

    Each starting with another peer keeps owners that sync at the same time off the same link.
    """
    return [(owner, (owner + step) % world_size) for step in range(1, world_size)]


def ring(owner: int, world_size: int) -> list[Hop]:
    """Each rank passes the block to its right-hand neighbour, until all have it."""
    return [((owner + step - 1) % world_size, (owner + step) % world_size) for step in range(1, world_size)]


STRATEGIES: dict[SyncStrategy, Callable[[int, int], list[Hop]]] = {"pairwise": pairwise, "ring": ring}

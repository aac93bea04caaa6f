"""Faults: what a user breaks on purpose, and where in a block's life it breaks."""

from torch import Tensor

from dinfer.plan.ops import Op


class Faults:
    """Those armed on one rank. Called by the ops that make a block, on the lanes' threads, with the block's place in
    the cache, [tokens, 2, kv_heads, head_dim]."""

    def computed(self, op: Op, block: Tensor) -> None:
        """The layer op has written its block, and nobody has looked at it."""

    def on_wire(self, op: Op, block: Tensor) -> None:
        """The recv has written its block, and nobody has looked at it."""

    def in_memory(self, op: Op, block: Tensor) -> None:
        """The block is here and its digests are taken."""

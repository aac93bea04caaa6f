"""Shape: how a prefill divides layers into stages, one a rank, and prompt tokens into chunks."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from numbers import Integral

from dinfer.config import layer_split_error
from dinfer.errors import excerpt
from dinfer.plan.ops import PlanError

Block = tuple[int, int]  # chunk and layer

MAX_CELLS = 2_000_000
"""blocks × ranks: each rank makes or receives each block by an op of its own. A million tokens in chunks of 512 on 8
ranks with 64 layers are half of that."""

_LARGEST = 10**12


@dataclass(frozen=True)
class Shape:
    """The size of a prefill: all that a plan depends on. Raises PlanError for sizes that do not fit together.

    `starts`: the first layer of each stage, the first of them 0; `len(starts)` is the world size. `lengths`: the tokens
    of each chunk where these differ; then `chunk_size` is the largest. Empty: `chunk_size` tokens each, the last chunk
    possibly fewer.
    """

    layers: int
    tokens: int
    chunk_size: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "tokens", "chunk_size"):
            check_size(name, getattr(self, name))
        bounds = (*self.starts, self.layers)
        if bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
            raise PlanError(
                f"stages start at layers {excerpt(list(self.starts), 200)} of {self.layers}; "
                "the first must be 0 and every stage must own at least one layer."
            )
        if self.lengths:
            check_lengths(self.lengths, self.tokens)
            if self.chunk_size != max(self.lengths):
                raise PlanError(
                    f"chunk_size is {self.chunk_size}, but the largest chunk has {max(self.lengths)} tokens."
                )
        count = len(self.lengths) or -(-self.tokens // self.chunk_size)
        check_cells(self.layers, count, self.world_size)

    @property
    def world_size(self) -> int:
        return len(self.starts)

    @cached_property
    def stages(self) -> tuple[range, ...]:
        """The layers that each rank owns, by rank."""
        return tuple(range(a, b) for a, b in zip(self.starts, (*self.starts[1:], self.layers), strict=True))

    @cached_property
    def chunks(self) -> tuple[range, ...]:
        """The token positions of each chunk, by chunk."""
        if self.lengths:
            ends = tuple(accumulate(self.lengths))
            return tuple(range(end - length, end) for length, end in zip(self.lengths, ends, strict=True))
        return tuple(
            range(a, min(a + self.chunk_size, self.tokens)) for a in range(0, self.tokens, self.chunk_size)
        )

    def chunk_of(self, token: int) -> int:
        """The chunk of a token of the prompt."""
        return bisect_right(self.chunks, token, key=lambda rows: rows.start) - 1

    @property
    def chunks_text(self) -> str:
        """The chunks' lengths in a plan's text: `128`, or `256+128+64` where they differ."""
        return "+".join(map(str, self.lengths or (self.chunk_size,)))

    @property
    def tokens_text(self) -> str:
        """`30 tokens in 4 chunks`, for one-line descriptions."""
        chunks = len(self.chunks)
        return f"{self.tokens} token{'s' * (self.tokens != 1)} in {chunks} chunk{'s' * (chunks != 1)}"

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The rank that owns each layer, by layer."""
        return tuple(rank for rank, stage in enumerate(self.stages) for _ in stage)

    @property
    def blocks(self) -> int:
        """How many blocks the prefill makes."""
        return self.layers * len(self.chunks)


def partition(
    *,
    layers: int,
    tokens: int,
    world_size: int,
    chunk_size: int,
    layer_split: Sequence[int] | None = None,
    lengths: Sequence[int] = (),
) -> Shape:
    """The shape of a prefill. `layer_split`: the first layer of each stage from the second on; None splits evenly.
    `lengths`: the tokens of each chunk instead of `chunk_size`.

    If `layers` is no multiple of `world_size`, the first stages own one layer more than the last ones: the last rank
    also computes the final norm. Raises PlanError.
    """
    for name, size in (
        ("world_size", world_size),
        ("layers", layers),
        ("tokens", tokens),
        ("chunk_size", chunk_size),
    ):
        check_size(name, size)
    if world_size > layers:
        raise PlanError(
            f"world_size is {world_size} but there are only {layers} layers; every rank must own at "
            f"least one: use at most {layers} ranks."
        )
    check_cells(layers, -(-tokens // chunk_size), world_size)  # before a list of all stages is made
    if layer_split is None:
        small, larger = divmod(layers, world_size)
        starts = [rank * small + min(rank, larger) for rank in range(world_size)]
    else:
        if len(layer_split) != world_size - 1:
            raise PlanError(layer_split_error(len(layer_split), world_size))
        starts = [0, *layer_split]
    if not lengths:
        return Shape(layers, tokens, chunk_size, tuple(starts))
    check_lengths(lengths, tokens)
    are_even = (
        len(lengths) == -(-tokens // lengths[0]) and len({*lengths[:-1]}) <= 1 and lengths[-1] <= lengths[0]
    )
    return Shape(layers, tokens, max(lengths), tuple(starts), () if are_even else tuple(lengths))


def check_lengths(lengths: Sequence[int], tokens: int) -> None:
    """Raises PlanError for chunks that are not all of the prompt."""
    for length in lengths:
        check_size("a chunk's length", length)
    if sum(lengths) != tokens:
        raise PlanError(
            f"the chunks have {sum(lengths):,} tokens in all, but the prompt has {tokens:,}: they must be all of it."
        )


def check_size(name: str, size: int) -> None:
    """Raises PlanError for a size that is out of range."""
    if size < 1:
        raise PlanError(f"{name} is {size}; it must be at least 1.")
    if size > _LARGEST:
        raise PlanError(f"{name} is {excerpt(size)}; it must be at most {_LARGEST:,}.")


def check_cells(layers: int, chunks: int, ranks: int) -> None:
    """Raises PlanError for a plan of too many ops."""
    if layers * chunks * ranks > MAX_CELLS:
        raise PlanError(
            f"{layers:,} layers × {chunks:,} chunks on {ranks:,} rank{'s' * (ranks > 1)} are "
            f"{layers * chunks * ranks:,} blocks on all ranks together; a plan may have {MAX_CELLS:,}: use a larger "
            "chunk_size, or check layers and tokens."
        )


def check_same_prefill(given: Shape, own: Shape) -> None:
    """Raises PlanError if a plan's shape differs from the run's in layers, tokens or ranks."""
    if (given.layers, given.tokens, given.world_size) != (own.layers, own.tokens, own.world_size):
        raise PlanError(
            f"the plan is for {given.layers} layers, {given.tokens} tokens and {given.world_size} ranks; "
            f"this run has {own.layers} layers, {own.tokens} tokens and {own.world_size} ranks."
        )


def within(name: str, value: int, count: int) -> int:
    """The index `value` of one of `count` things called `name`. Raises PlanError if it is out of range."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise PlanError(f"{name} is {value!r}; it must be a whole number from 0 to {count - 1}.")
    if not 0 <= value < count:
        raise PlanError(f"there is no {name} {value}: the {name}s are 0 to {count - 1}.")
    return value

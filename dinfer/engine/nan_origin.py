"""NaN in the logits: where it came from. Only searched for once it is there, so it costs a good run nothing.

A NaN spreads to later layers, to later tokens, and within its chunk to earlier ones too (attention gives a token that
it masks the weight 0, and 0 × NaN is NaN). So of the first chunk that has one, the first layer is where it arose.
"""

from typing import NamedTuple

from torch import Tensor

from dinfer.errors import DinferError
from dinfer.model.cache import KVCache
from dinfer.plan.partition import Shape


class NanOrigin(NamedTuple):
    """A token's K and V in one layer."""

    token: int
    layer: int


NOWHERE = NanOrigin(-1, -1)
"""every K and V is a number"""


class NotANumber(DinferError, RuntimeError):
    """The logits are NaN, on the ranks of `places`: where the first NaN of each one's KV is."""

    def __init__(
        self, position: int, places: dict[int, NanOrigin], world_size: int, shape: Shape | None
    ) -> None:
        by_place: dict[NanOrigin, list[int]] = {}
        for rank, place in places.items():
            by_place.setdefault(place, []).append(rank)
        found = [
            f"{_where(place, shape)} of the KV on {_who(ranks, world_size)}: {_cause(place, set(places), shape)}"
            for place, ranks in by_place.items()
        ]
        super().__init__(
            f"the logits of new token {position} are not numbers (NaN) on {_who(list(places), world_size)}. "
            + " ".join(found)
        )
        self.position, self.places = position, places


def has_nan(logits: Tensor) -> bool:
    return bool(logits.max().isnan())  # the maximum of anything with a NaN is NaN; cheaper than asking each


def first_nan(cache: KVCache, tokens: int, shape: Shape | None) -> NanOrigin:
    """The first NaN of the first `tokens` rows of a cache, by chunk, then layer, then token; or NOWHERE.

    A new token is computed alone, as a chunk of its own; without a `shape`, the rows count as one chunk.
    """
    found = []
    for layer in range(cache.layers):
        rows = cache.block(layer, 0, tokens).isnan().flatten(1).any(1)
        if rows.any():
            token = int(rows.int().argmax())
            found.append((_chunk(token, shape), NanOrigin(token, layer)))
    return min(found, key=lambda one: (one[0], one[1].layer), default=(0, NOWHERE))[1]


def _chunk(token: int, shape: Shape | None) -> int:
    """A number that grows with the chunk."""
    if shape is None:
        return 0
    return token // shape.chunk_size if token < shape.tokens else len(shape.chunks) + token - shape.tokens


def _where(place: NanOrigin, shape: Shape | None) -> str:
    if place == NOWHERE:
        return "No NaN is in any row"
    if shape is None or place.token >= shape.tokens:
        return f"The first NaN is in layer {place.layer}, token {place.token},"
    return f"The first NaN is in layer {place.layer}, chunk {place.token // shape.chunk_size} (token {place.token})"


def _cause(place: NanOrigin, ranks: set[int], shape: Shape | None) -> str:
    """Where to look. `ranks` are those with NaN in their logits."""
    remedy = "float16 overflows where bfloat16 and float32 do not, or the checkpoint is damaged there."
    if place == NOWHERE:
        return f"it arose after the KV of the last layer, in its attention or MLP, the norm or the head; {remedy}"
    owner = shape.owners[place.layer] if shape and place.token < shape.tokens else None
    if owner is not None and owner not in ranks:
        return f"rank {owner} computed that block and holds another, so it changed on its way or in memory."
    before = f"in layer {place.layer - 1} after its KV" if place.layer else "in the embedding"
    by = "" if owner is None else f"computed by rank {owner}; "
    return f"{by}it arose in that layer's K and V or {before}; {remedy}"


def _who(ranks: list[int], world_size: int) -> str:
    if len(ranks) == world_size > 1:
        return "all ranks"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"

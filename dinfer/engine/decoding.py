"""Decode: every rank computes all layers alone on the synced cache, and the ranks compare each token.

If a rank's logits are NaN, all ranks search their KV for the first one. A NaN spreads to later layers, to later tokens,
and within its chunk to earlier ones too (attention gives a masked token the weight 0, and 0 × NaN is NaN). So it arose
in the first layer of the first chunk that has one.
"""

import struct
from collections.abc import Iterator, Sequence
from time import monotonic_ns
from typing import NamedTuple

from torch import Tensor

from dinfer.engine.prefill import Prefill
from dinfer.errors import DinferError, ModelError
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.sampling import Sampler
from dinfer.plan.partition import Shape
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder
from dinfer.transport.gloo import Comm

_TOKEN = struct.Struct("<q")

_NO_TOKEN = -1
"""what a rank sends whose logits are NaN"""

_PLACE = struct.Struct("<qq")


class TokensDiffer(DinferError, RuntimeError):
    """Ranks chose different tokens. `position` counts new tokens from 0. By rank, `tokens` has the chosen token and
    `logits` that rank's logits of all chosen tokens.
    """

    def __init__(self, position: int, tokens: list[int], logits: list[dict[int, float]]) -> None:
        chosen = "; ".join(
            f"rank {rank} chose {token} ({', '.join(f'logit of {t}: {v:.6g}' for t, v in values.items())})"
            for rank, (token, values) in enumerate(zip(tokens, logits, strict=True))
        )
        super().__init__(f"the ranks' tokens differ, first at new token {position}: {chosen}")
        self.position, self.tokens, self.logits = position, tokens, logits


class NanOrigin(NamedTuple):
    """The K and V of one token in one layer, in which a NaN was found first."""

    token: int
    layer: int


NOWHERE = NanOrigin(-1, -1)
"""no NaN in K or V"""


class NotANumber(DinferError, RuntimeError):
    """The logits are NaN on the ranks in `places`, by which the first NaN of that rank's KV is found.

    `position` counts new tokens from 0.
    """

    def __init__(
        self, position: int, places: dict[int, NanOrigin], world_size: int, shape: Shape | None
    ) -> None:
        by_place: dict[NanOrigin, list[int]] = {}
        for rank, place in places.items():
            by_place.setdefault(place, []).append(rank)
        found = [
            f"{_where(place, shape)} of the KV on {_ranks_text(ranks, world_size)}: {_cause(place, set(places), shape)}"
            for place, ranks in by_place.items()
        ]
        super().__init__(
            f"the logits of new token {position} are not numbers (NaN) on {_ranks_text(list(places), world_size)}. "
            + " ".join(found)
        )
        self.position, self.places = position, places


class Decoding:
    """Makes new tokens one after another, the same on every rank. All ranks must take the same number of steps.

    `tokens`: the new tokens so far.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        prompt_tokens: int,
        final: Tensor,
        sampler: Sampler,
        comm: Comm,
        recorder: Recorder | None = None,
        shape: Shape | None = None,
        state: Prefill | None = None,
    ) -> None:
        """`final` is the normed hidden state of the prompt's last token, [1, 1, hidden_size]. `shape` names chunk and
        owner in messages; `state` is that of the prompt whose cache this is, for faults; None for other KV."""
        self.tokens: list[int] = []
        self.cache = cache
        self._state = state
        self._held: list[int] = []
        self._decoder, self._prompt_tokens = decoder, prompt_tokens
        self._final, self._sampler, self._comm, self._recorder = final, sampler, comm, recorder
        self._shape = shape

    @property
    def is_done(self) -> bool:
        """Whether the last token ends the text, or the cache is full."""
        if not self.tokens:
            return False
        step = 2 if self._state and self._state.faults.repeats else 1
        extra = max(self._state.extra.values(), default=0) if self._state else 0
        capacity = min(self.cache.capacity - extra, self._decoder.max_positions)
        return self.tokens[-1] in self._decoder.eos_ids or self.rows + step > capacity

    @property
    def rows(self) -> int:
        """How many rows a layer holds: one for each token of the prompt and each new token except the last, which has
        none yet. (A layer to which a fault appended rows holds more.)"""
        return self._held[-1] if self._held else self._prompt_tokens

    def step(self) -> int:
        """Make the next token. Raises on every rank: TokensDiffer if the ranks disagree, NotANumber if the logits of
        one are NaN."""
        start = monotonic_ns()
        new, hidden = (self._prompt_tokens, self._final) if not self.tokens else self._forward()
        logits = self._decoder.logits(hidden)
        token = _NO_TOKEN if has_nan(logits) else self._sampler(logits, len(self.tokens))
        computed = monotonic_ns()
        self._compare(token, logits)
        self.tokens.append(token)
        self._held.append(new)
        if self._recorder:
            self._record(start, computed)
        return token

    def back_to(self, tokens: int) -> None:
        """Drop all new tokens after the first `tokens`. The next steps repeat them, unless the user edits something."""
        del self.tokens[tokens:], self._held[tokens:]

    def run(self, max_new_tokens: int) -> Iterator[int]:
        """Step until the text ends or there are `max_new_tokens` new tokens; yields each."""
        while len(self.tokens) < max_new_tokens and not self.is_done:
            yield self.step()

    def _forward(self) -> tuple[int, Tensor]:
        """Run all layers on the last token. Returns the number of rows then, and the normed hidden state."""
        row, state = self.rows, self._state
        hidden = self._decoder.forward(self.tokens[-1:], self.cache, row, state.extra if state else None)
        return row + (state.faults.new_row(row) if state else 1), self._decoder.norm(hidden)

    def _compare(self, token: int, logits: Tensor) -> None:
        chosen = [token]
        if self._comm.world_size > 1:
            chosen = [_TOKEN.unpack(data)[0] for data in self._comm.all_gather(_TOKEN.pack(token))]
        if _NO_TOKEN in chosen:
            raise self._not_a_number([rank for rank, answer in enumerate(chosen) if answer == _NO_TOKEN])
        if len(set(chosen)) == 1:
            return
        distinct = sorted(set(chosen))
        layout = struct.Struct(f"<{len(distinct)}d")
        mine = layout.pack(*(float(logits[t]) for t in distinct))
        by_rank = [
            dict(zip(distinct, layout.unpack(data), strict=True)) for data in self._comm.all_gather(mine)
        ]
        raise TokensDiffer(len(self.tokens), chosen, by_rank)

    def _not_a_number(self, ranks: list[int]) -> NotANumber:
        """Exchange the first NaN of each rank's KV. All ranks call it."""
        mine = first_nan(self.cache, self.rows + bool(self.tokens), self._shape)
        found = [mine]
        if self._comm.world_size > 1:
            found = [NanOrigin(*_PLACE.unpack(data)) for data in self._comm.all_gather(_PLACE.pack(*mine))]
        places = {rank: found[rank] for rank in ranks}
        return NotANumber(len(self.tokens), places, self._comm.world_size, self._shape)

    def _record(self, start: int, computed: int) -> None:
        assert self._recorder is not None
        end = monotonic_ns()
        position = len(self.tokens) - 1
        lane = len(self._recorder.lanes) - 1
        rank = self._comm.rank
        self._recorder.record(
            lane,
            Event(
                rank,
                "decode",
                "decode",
                start,
                start,
                start,
                computed,
                what="token",
                tokens=1,
                index=position,
            ),
        )
        if self._comm.world_size > 1:
            self._recorder.record(
                lane,
                Event(
                    rank,
                    "decode",
                    "all_gather",
                    computed,
                    computed,
                    computed,
                    end,
                    what="token",
                    tokens=1,
                    index=position,
                ),
            )


def cache_of(decoder: Decoder, kv_caches: Sequence[tuple[Tensor, Tensor]], capacity: int) -> KVCache:
    """A cache of `capacity` rows with K and V of every layer, each [1, kv_heads, tokens, head_dim]. Raises ModelError
    for another number of layers."""
    if len(kv_caches) != decoder.num_layers:
        raise ModelError(
            f"kv_caches has {len(kv_caches)} layers; this model has {decoder.num_layers}: give K and V of each."
        )
    cache = decoder.new_cache(capacity)
    for layer, (k, v) in enumerate(kv_caches):
        cache.write(layer, 0, k, v)
    return cache


def has_nan(logits: Tensor) -> bool:
    return bool(logits.max().isnan())  # the maximum of values with a NaN is NaN; cheaper than isnan of each


def first_nan(cache: KVCache, tokens: int, shape: Shape | None) -> NanOrigin:
    """The first NaN in the first `tokens` rows of a cache, by chunk, then layer, then token; else NOWHERE.

    Each new token counts as a chunk of its own. Without a `shape`, all rows count as one chunk.
    """
    found = []
    for layer in range(cache.layers):
        rows = cache.block(layer, 0, tokens).isnan().flatten(1).any(1)
        if rows.any():
            token = int(rows.int().argmax())
            found.append((_chunk(token, shape), NanOrigin(token, layer)))
    return min(found, key=lambda one: (one[0], one[1].layer), default=(0, NOWHERE))[1]


def _chunk(token: int, shape: Shape | None) -> int:
    """A number that orders tokens by chunk."""
    if shape is None:
        return 0
    return token // shape.chunk_size if token < shape.tokens else len(shape.chunks) + token - shape.tokens


def _where(place: NanOrigin, shape: Shape | None) -> str:
    if place == NOWHERE:
        return "There is no NaN in any row"
    if shape is None or place.token >= shape.tokens:
        return f"The first NaN is in layer {place.layer}, token {place.token},"
    return f"The first NaN is in layer {place.layer}, chunk {place.token // shape.chunk_size} (token {place.token})"


def _cause(place: NanOrigin, ranks: set[int], shape: Shape | None) -> str:
    """Where the NaN arose and what to check. `ranks` are those with NaN in their logits."""
    remedy = "float16 may have overflowed (use bfloat16 or float32), or the checkpoint is damaged there."
    if place == NOWHERE:
        return f"it arose after the KV of the last layer, in its attention or MLP, the norm or the head; {remedy}"
    owner = shape.owners[place.layer] if shape and place.token < shape.tokens else None
    if owner is not None and owner not in ranks:
        return f"rank {owner} computed that block without NaN, so it changed on the way or in memory."
    before = f"in layer {place.layer - 1} after its KV" if place.layer else "in the embedding"
    by = "" if owner is None else f"computed by rank {owner}; "
    return f"{by}it arose in that layer's K and V or {before}; {remedy}"


def _ranks_text(ranks: list[int], world_size: int) -> str:
    if len(ranks) == world_size > 1:
        return "all ranks"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"

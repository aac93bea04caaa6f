"""Decode: every rank computes all layers alone on the synced cache; the ranks compare each token."""

import struct
from collections.abc import Iterator, Sequence
from time import monotonic_ns

from torch import Tensor

from dinfer.engine.nan_origin import NanOrigin, NotANumber, first_nan, has_nan
from dinfer.engine.prefill import Prefill
from dinfer.errors import DinferError
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.errors import ModelError
from dinfer.model.sampling import Sampler
from dinfer.plan.partition import Shape
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder
from dinfer.transport.gloo import Comm

_TOKEN = struct.Struct("<q")

_NO_TOKEN = -1
"""what a rank says whose logits are NaN"""

_PLACE = struct.Struct("<qq")


class TokensDiffer(DinferError, RuntimeError):
    """Ranks chose different tokens. `position` counts new tokens from 0; `tokens` and `logits` are by rank:
    the token each chose, and each rank's logits of all the tokens chosen.
    """

    def __init__(self, position: int, tokens: list[int], logits: list[dict[int, float]]) -> None:
        said = "; ".join(
            f"rank {rank} chose {token} ({', '.join(f'logit of {t}: {v:.6g}' for t, v in values.items())})"
            for rank, (token, values) in enumerate(zip(tokens, logits, strict=True))
        )
        super().__init__(f"the ranks' tokens differ, first at new token {position}: {said}")
        self.position, self.tokens, self.logits = position, tokens, logits


class Decoding:
    """New tokens one after another, the same on every rank. All ranks must take the same number of steps."""

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
        """`final` is the normed hidden state of the prompt's last token, [1, 1, hidden_size]; `shape` tells which
        chunk and rank a token and layer of the prompt are of, where that is known; `state`: whose cache this is, where
        faults may strike."""
        self.tokens: list[int] = []
        self.cache = cache
        self._state = state
        self._held: list[int] = []
        self._decoder, self._prompt_tokens = decoder, prompt_tokens
        self._final, self._sampler, self._comm, self._recorder = final, sampler, comm, recorder
        self._shape = shape

    @property
    def is_done(self) -> bool:
        """Whether the last token ends the text or the cache has no room for another step."""
        if not self.tokens:
            return False
        step = 2 if self._state and self._state.faults.repeats else 1
        extra = max(self._state.extra.values(), default=0) if self._state else 0
        room = min(self.cache.capacity - extra, self._decoder.max_positions)
        return self.tokens[-1] in self._decoder.eos_ids or self.rows + step > room

    @property
    def rows(self) -> int:
        """How many rows a layer holds: those of the prompt and of every new token but the last, which has none yet.
        (Where a fault has appended rows to one layer, that one holds more.)"""
        return self._held[-1] if self._held else self._prompt_tokens

    def step(self) -> int:
        """The next token. Raises, on every rank, TokensDiffer if they do not agree on it, and NotANumber if the
        logits of one of them are NaN."""
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
        """Forget all new tokens but the first that many; the same ones come again, unless something was edited."""
        del self.tokens[tokens:], self._held[tokens:]

    def run(self, max_new_tokens: int) -> Iterator[int]:
        """Steps until the text ends or `max_new_tokens` were made."""
        while len(self.tokens) < max_new_tokens and not self.is_done:
            yield self.step()

    def _forward(self) -> tuple[int, Tensor]:
        """How many rows there are then, and the normed hidden state of the last token."""
        row, state = self.rows, self._state
        hidden = self._decoder.forward(self.tokens[-1:], self.cache, row, state.extra if state else None)
        return row + (state.faults.new_row(row) if state else 1), self._decoder.norm(hidden)

    def _compare(self, token: int, logits: Tensor) -> None:
        chosen = [token]
        if self._comm.world_size > 1:
            chosen = [_TOKEN.unpack(data)[0] for data in self._comm.all_gather(_TOKEN.pack(token))]
        if _NO_TOKEN in chosen:
            raise self._not_a_number([rank for rank, said in enumerate(chosen) if said == _NO_TOKEN])
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
        """All ranks search their KV, and tell one another what they found."""
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
    """A cache that holds K and V of every layer, each [1, kv_heads, tokens, head_dim]. Raises ModelError."""
    if len(kv_caches) != decoder.num_layers:
        raise ModelError(
            f"kv_caches has {len(kv_caches)} layers; this model has {decoder.num_layers}: give K and V of each."
        )
    cache = decoder.new_cache(capacity)
    cache.fill(kv_caches)
    return cache

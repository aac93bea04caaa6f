"""Decode: every rank computes all layers alone on the synced cache, and the ranks compare each token.

Before it, `recheck` compares all blocks in memory with their digests. If a rank's logits are NaN or Inf, all ranks
search their KV for the first one. A NaN spreads to later layers, to later tokens, and within its chunk to earlier
ones too (attention gives a masked token the weight 0, and 0 × NaN is NaN). So it arose in the first layer of the first
chunk that has one.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from time import monotonic_ns
from typing import Literal, NamedTuple

from torch import Tensor

from dinfer.engine.ahead import Ahead
from dinfer.engine.corruption import Corrupted, Corruption
from dinfer.engine.decode_start import ChosenToken, DecodeStart, choose, record
from dinfer.engine.prefill import Prefill
from dinfer.errors import DinferError, ModelError
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.kernels.graphs import MOST_POSITIONS
from dinfer.model.kernels.token_graph import NO_TOKEN
from dinfer.model.sampling import Sampler
from dinfer.plan.partition import Shape
from dinfer.trace.recorder import Recorder
from dinfer.transport.gloo import Comm
from dinfer.verdict.where import rank_spans_text

_TOKEN = struct.Struct("<q")
_PLACE = struct.Struct("<qq")


class TokensDiffer(DinferError, RuntimeError):
    """Ranks chose different tokens, at new token `position` (from 0). By rank, `tokens` has the chosen token and
    `logits` that rank's logits of all chosen tokens."""

    def __init__(self, position: int, tokens: list[int], logits: list[dict[int, float]]) -> None:
        chosen = "; ".join(
            f"rank {rank} chose {token} ({', '.join(f'logit of {t}: {v:.6g}' for t, v in values.items())})"
            for rank, (token, values) in enumerate(zip(tokens, logits, strict=True))
        )
        super().__init__(f"the ranks' tokens differ, first at new token {position}: {chosen}")
        self.position, self.tokens, self.logits = position, tokens, logits


class NanOrigin(NamedTuple):
    """The K and V of one token in one layer, in which NaN or Inf was found first."""

    token: int
    layer: int


NOWHERE = NanOrigin(-1, -1)
"""no NaN or Inf in K or V"""


class NotANumber(DinferError, RuntimeError):
    """The logits of new token `position` (from 0) are NaN or Inf. `places`: by rank, the first one in its KV."""

    def __init__(
        self, position: int, places: dict[int, NanOrigin], world_size: int, shape: Shape | None
    ) -> None:
        by_place: dict[NanOrigin, list[int]] = {}
        for rank, place in places.items():
            by_place.setdefault(place, []).append(rank)
        who = _ranks_text(list(places), world_size)
        said = f"the logits of new token {position} are not finite (NaN or Inf) on {who}."
        for place, ranks in by_place.items():
            where, cause = _told(place, set(places), shape)
            said += f" {where} of the KV on {_ranks_text(ranks, world_size)}: {cause}"
        super().__init__(said)
        self.position, self.places = position, places


def _told(place: NanOrigin, ranks: set[int], shape: Shape | None) -> tuple[str, str]:
    """Where the first NaN or Inf is; how it arose, and what to check. `ranks` are those whose logits have one."""
    remedy = "float16 may have overflowed (use bfloat16 or float32), or the checkpoint is damaged there."
    if place == NOWHERE:
        after = "it arose after the KV of the last layer, in its attention or MLP, the norm or the head"
        return "There is no NaN or Inf in any row", f"{after}; {remedy}"
    where, by = f"The first NaN or Inf is in layer {place.layer}, token {place.token},", ""
    if shape is not None and place.token < shape.tokens:
        chunk, owner = shape.chunk_of(place.token), shape.owners[place.layer]
        where = f"The first NaN or Inf is in layer {place.layer}, chunk {chunk} (token {place.token})"
        if owner not in ranks:
            cause = f"rank {owner} computed that block without any, so it changed on the way or in memory."
            return where, cause
        by = f"computed by rank {owner}; "
    before = f"in layer {place.layer - 1} after its KV" if place.layer else "in the embedding"
    return where, f"{by}it arose in that layer's K and V or {before}; {remedy}"


def _ranks_text(ranks: list[int], world_size: int) -> str:
    if len(ranks) == world_size > 1:
        return "all ranks"
    return rank_spans_text(ranks)


class Decoding:
    """Makes new tokens (`tokens`), the same on every rank. All ranks must take the same number of steps."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        prompt_tokens: int,
        final: Tensor,
        sampler: Sampler,
        comm: Comm,
        recorder: Recorder | None,
        state: Prefill | None,
        ahead: Ahead | None = None,
        start: DecodeStart | None = None,
    ) -> None:
        """`final` is the normed hidden state of the prompt's last token, [1, 1, hidden_size]. `state` is that of the
        prompt whose cache this is, for faults and for the words of errors; None for other KV. `ahead` makes tokens by
        graphs; None: transformers' own kernels do. `start`: what was computed of the first tokens while blocks came."""
        self.tokens: list[int] = []
        self.cache = cache
        self._rows = [prompt_tokens]  # before the first step and after each
        self._state, self._shape = state, state.plan.shape if state else None
        self._decoder, self._final, self._sampler = decoder, final, sampler
        self._comm, self._recorder, self._ahead, self._start = comm, recorder, ahead, start
        self._wanted = 0

    @property
    def stopped(self) -> Literal["", "end of text", "positions"]:
        """Why no further token can be made: the last one ends the text, or all positions of the model, or rows of the
        cache, are used; "" while one can."""
        if not self.tokens:
            return ""
        if self.tokens[-1] in self._decoder.eos_ids:
            return "end of text"
        step = 2 if self._state and self._state.faults.repeats else 1
        extra = max(self._state.extra.values(), default=0) if self._state else 0
        capacity = min(self.cache.capacity - extra, self._decoder.max_positions)
        return "positions" if self.rows + step > capacity else ""

    @property
    def rows(self) -> int:
        """How many rows a layer holds: one a token, but for the last new one. (A fault may append more to a layer.)"""
        return self._rows[-1]

    def step(self) -> int:
        """Make the next token. Raises on every rank: TokensDiffer, or NotANumber if those of one have NaN or Inf."""
        start, row, number = monotonic_ns(), self.rows, len(self.tokens)
        was_computed = number == 0 and self._start is not None and self._start.first is not None
        if self.tokens and self._ahead and row < MOST_POSITIONS and not self._has_odd_rows:
            fits = row + 2 <= min(self.cache.capacity, self._decoder.max_positions, MOST_POSITIONS)
            more = fits and len(self.tokens) + 1 < self._wanted
            token, logits = self._ahead.take(self.cache, self.tokens[-1], row, number, more=more)
            row += 1
        else:
            (token, logits), row = self._forward(row)
        computed = monotonic_ns()
        self._compare(token, logits)
        end = monotonic_ns()
        if self._recorder:
            about = {"what": "token", "tokens": 1, "index": number}
            if not was_computed:
                record(self._recorder, "decode", start, computed, **about)
            if self._comm.world_size > 1:
                record(self._recorder, "all_gather", computed, end, **about)
        self.tokens.append(token)
        self._rows.append(row)
        return token

    def _forward(self, row: int) -> tuple[ChosenToken, int]:
        """The next token by the decoder's own forward, and the row after it."""
        hidden, state, started = self._final, self._state, self._start
        if not self.tokens and started and started.first:
            return started.first, row
        if self.tokens:
            if started and started.hidden is not None:
                hidden, self._start = started.hidden, None
            else:
                hidden = self._decoder.forward(
                    self.tokens[-1:], self.cache, row, state.extra if state else None
                )
            row += state.faults.new_row(row) if state else 1
            hidden = self._decoder.norm(hidden)
        return choose(self._decoder, self._sampler, hidden, len(self.tokens)), row

    @property
    def _has_odd_rows(self) -> bool:
        """Whether a fault has added rows to a layer, or adds them in decode."""
        return bool(self._state and (self._state.extra or self._state.faults.repeats))

    def begin(self, wanted: int) -> None:
        """Steps up to so many new tokens follow one another, so that a GPU may begin one before the last has been
        looked at. Since the step before, something may have changed, such as the KV, by hand."""
        self._wanted = wanted
        if self._ahead:
            self._ahead.restart()

    def end(self) -> None:
        """The steps have ended for now. Before the next ones anything may change, so what was computed of them while
        blocks came does not count any more."""
        self._start = None

    def back_to(self, tokens: int) -> None:
        """Drop all new tokens after the first `tokens`. The next steps repeat them, unless the user edits something."""
        self.end()
        del self.tokens[tokens:], self._rows[tokens + 1 :]
        self.begin(0)

    def run(self, max_new_tokens: int) -> Iterator[int]:
        """Step until the text ends or there are `max_new_tokens` new tokens; yields each."""
        self.begin(max_new_tokens)
        while len(self.tokens) < max_new_tokens and not self.stopped:
            yield self.step()

    def _compare(self, token: int, logits: Tensor) -> None:
        chosen = [_TOKEN.unpack(data)[0] for data in _gather(self._comm, _TOKEN.pack(token))]
        if NO_TOKEN in chosen:
            mine = first_nan(self.cache, self.rows + bool(self.tokens), self._shape)
            found = [NanOrigin(*_PLACE.unpack(data)) for data in _gather(self._comm, _PLACE.pack(*mine))]
            places = {rank: found[rank] for rank, answer in enumerate(chosen) if answer == NO_TOKEN}
            raise NotANumber(len(self.tokens), places, self._comm.world_size, self._shape)
        distinct = sorted(set(chosen))
        if len(distinct) == 1:
            return
        layout = struct.Struct(f"<{len(distinct)}d")
        gathered = self._comm.all_gather(layout.pack(*(float(logits[t]) for t in distinct)))
        by_rank = [dict(zip(distinct, layout.unpack(data), strict=True)) for data in gathered]
        raise TokensDiffer(len(self.tokens), chosen, by_rank)


def _gather(comm: Comm, data: bytes) -> list[bytes]:
    return comm.all_gather(data) if comm.world_size > 1 else [data]


def recheck(state: Prefill, recorder: Recorder, comm: Comm) -> float:
    """Compare all rows with their digests and report changed blocks. All ranks must call it. Returns the seconds taken.

    Raises Corrupted on every rank if any rank found a change and the policy is fail, or pause and the block is new:
    decode needs all ranks, so all stop if one does.
    """
    ledger, policy = state.ledger, state.alarm.policy
    if not ledger.on:
        return 0.0
    start = monotonic_ns()
    found = state.changed_blocks()
    end, size = monotonic_ns(), sum(state.block(*key).nbytes for key in ledger.entries)
    record(recorder, "check", start, end, bytes=size)
    new = [one for one in found if (one.chunk, one.layer) not in ledger.told]
    for one in new:
        where = {"what": "kv", "chunk": one.chunk, "layer": one.layer, "bytes": one.bytes}
        record(recorder, "corrupt", end, end, tokens=len(state.rows(one.chunk)), **where)
        ledger.told.add((one.chunk, one.layer))
        state.alarm.report(one)
    if policy != "record":
        first = (found if policy == "fail" else new)[:1]
        mine = json.dumps(first[0].as_dict() if first else None).encode()
        gathered = map(json.loads, _gather(comm, mine.ljust(512)))  # long enough for a Corruption
        if changed := [str(Corruption.of(one)) for one in gathered if one]:
            goes_on = "Decode again to go on with these bytes."
            advice = "The run ends because on_corruption is fail." if policy == "fail" else goes_on
            raise Corrupted(f"before decode: {'; '.join(changed)}. {advice}")
    return (end - start) / 1e9


def cache_of(decoder: Decoder, kv_caches: Sequence[tuple[Tensor, Tensor]], capacity: int) -> KVCache:
    """A cache with K and V of every layer, each [1, kv_heads, tokens, head_dim]. Raises ModelError for other layers."""
    if len(kv_caches) != decoder.num_layers:
        raise ModelError(
            f"kv_caches has {len(kv_caches)} layers; this model has {decoder.num_layers}: give K and V of each."
        )
    cache = decoder.new_cache(capacity)
    for layer, (k, v) in enumerate(kv_caches):
        cache.write(layer, 0, k, v)
    return cache


def first_nan(cache: KVCache, tokens: int, shape: Shape | None) -> NanOrigin:
    """The first NaN or Inf in the first `tokens` rows of a cache, by chunk, then layer, then token; else NOWHERE.

    Each new token counts as a chunk of its own. Without a `shape`, all rows count as one chunk.
    """

    def chunk_of(token: int) -> int:
        """A number that orders tokens by chunk."""
        if shape is None:
            return 0
        return shape.chunk_of(token) if token < shape.tokens else len(shape.chunks) + token - shape.tokens

    found = []
    for layer in range(cache.layers):
        rows = cache.block(layer, 0, tokens).isfinite().logical_not_().flatten(1).any(1)
        if rows.any():
            found.append(NanOrigin(int(rows.int().argmax()), layer))
    return min(found, key=lambda one: (chunk_of(one.token), one.layer), default=NOWHERE)

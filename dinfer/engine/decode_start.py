"""The start of decode while prefill ends: what one rank computes of the first two tokens while blocks still arrive.

The first new token needs the final hidden state alone; the second needs, layer by layer, that layer's blocks of all
chunks. So while the blocks of later layers are still on their way, earlier layers compute. Nothing here needs another
rank, so it can be given up at any moment; `Decoding` takes what was computed, if nothing has changed since, and
compares the ranks' tokens.
"""

from collections.abc import Callable
from time import monotonic_ns
from typing import Any, NamedTuple

from torch import Tensor

from dinfer.engine.lanes import LaneExecutor
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.kernels.token_graph import NO_TOKEN
from dinfer.model.sampling import Sampler
from dinfer.plan.ops import FINAL, Value
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder
from dinfer.transport.deadline import StillWaiting


class GivenUp(Exception):
    """The start was given up: its prompt is sent elsewhere, or released."""


class ChosenToken(NamedTuple):
    """A token, NO_TOKEN for logits that are not finite, and its logits [vocab_size]."""

    token: int
    logits: Tensor


def record(recorder: Recorder, kind: str, start: int, end: int, **fields: Any) -> None:
    """Record an event on the recorder's lane for decode, the last one. Its `met` is its start, if not given."""
    lane = len(recorder.lanes) - 1
    times = {"ready": start, "start": start, "met": start, "end": end}
    event = Event(recorder.rank, recorder.lanes[lane], kind, **{**times, **fields})
    recorder.record(lane, event)


def choose(decoder: Decoder, sampler: Sampler, hidden: Tensor, number: int) -> ChosenToken:
    """New token `number` (from 0), from a normed hidden state [1, 1, hidden_size]."""
    logits = decoder.logits(hidden)
    # The maximum of values with a NaN is NaN; that is cheaper than a look at each. -Inf alone is no fault.
    token = NO_TOKEN if not logits.max().isfinite() else sampler(logits, number)
    return ChosenToken(token, logits)


class DecodeStart:
    """`first`: the first new token; `hidden`: the hidden state [1, 1, hidden_size] after all layers on it, from which
    comes the second. Both None until they are computed, `hidden` also where no second token is wanted or possible."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        executor: LaneExecutor,
        recorder: Recorder,
        sampler: Sampler,
        max_new_tokens: int,
        is_unchanged: Callable[[], bool],
    ) -> None:
        """`is_unchanged()`: whether the prompt is as it was when this began, but for its ops; asked under the gate's
        lock."""
        self.first: ChosenToken | None = None
        self.hidden: Tensor | None = None
        self._decoder, self._cache = decoder, _UncountedCache(cache)
        self._executor, self._recorder = executor, recorder
        self._sampler, self._wanted, self._is_unchanged = sampler, max_new_tokens, is_unchanged
        self._is_given_up = False

    def give_up(self) -> None:
        """Whoever waits in `run` goes on at once, with GivenUp."""
        with self._executor.gate.change():
            self._is_given_up = True

    def counts(self) -> bool:
        """Whether what it has computed is what decode would compute now."""
        with self._executor.gate.hold():
            return self._is_wanted

    def run(self, on_token: Callable[[int], None], patience: float | None = None) -> None:
        """Compute as values come; `on_token` is called with the first token. Raises OpFailed if an op fails, GivenUp,
        and StillWaiting if no op ends for `patience` seconds."""
        state = self._executor.state
        self._wait(lambda: self._executor.holds(FINAL) or self._executor.is_done(), patience)
        if state.final is None:
            return
        state.finite.settle()  # the search for NaN in prefill is over: from here on decode alone uses its lane
        start = monotonic_ns()
        first = choose(self._decoder, self._sampler, state.final[:, -1:], 0)
        self._record(start, index=0)
        self.first = first
        if first.token == NO_TOKEN:
            return
        if not self.counts():
            raise GivenUp
        on_token(first.token)
        row = self._executor.plan.shape.tokens
        fits = row < min(self._cache.capacity, self._decoder.max_positions)
        if fits and self._wanted > 1 and first.token not in self._decoder.eos_ids:
            self.hidden = self._layers(first.token, row, patience)

    def _layers(self, token: int, row: int, patience: float | None) -> Tensor:
        """All layers on a token, each as soon as its blocks are here; an event each, in which `met` is when they
        were."""
        hidden = self._decoder.embed([token])
        for layer in range(self._decoder.num_layers):
            start = monotonic_ns()
            self._wait_for_layer(layer, patience)
            met = monotonic_ns()
            hidden = self._decoder.layer(layer, hidden, self._cache, row)
            self._record(start, index=1, layer=layer, met=met)
        return hidden

    def _wait_for_layer(self, layer: int, patience: float | None) -> None:
        """Wait for a layer's blocks of all chunks."""
        chunks, chunk = len(self._executor.plan.shape.chunks), 0

        def have_come() -> bool:
            nonlocal chunk
            while chunk < chunks and self._executor.holds(Value("kv", chunk, layer)):
                chunk += 1
            return chunk == chunks

        self._wait(have_come, patience)

    def _wait(self, until: Callable[[], bool], patience: float | None) -> None:
        before = None
        while not self._executor.wait(lambda: not self._is_wanted or until(), patience):
            if before == (before := self._executor.stand()):
                raise StillWaiting(
                    f"rank {self._executor.rank} stands at {before}; there was no progress for {patience:g} s. "
                    "All ranks must make this call."
                )
        if not self._is_wanted:
            raise GivenUp

    @property
    def _is_wanted(self) -> bool:
        return not (self._is_given_up or self._executor.is_closing) and self._is_unchanged()

    def _record(self, start: int, **fields: int) -> None:
        with self._executor.gate.hold():  # who has given it up may write to this lane
            if self._is_wanted:
                record(self._recorder, "decode", start, monotonic_ns(), what="token", tokens=1, **fields)


class _UncountedCache(KVCache):
    """The same memory as a cache's. What is written here counts no version of its tensors up, by which the user's edits
    are found: this is none."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__(1, 1, cache.kv_heads, cache.head_dim, cache.dtype, cache.device)
        self.layers, self.capacity = cache.layers, cache.capacity
        self._tensors = [cache.tensor(layer).data for layer in range(cache.layers)]

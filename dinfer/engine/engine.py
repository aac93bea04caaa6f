"""Engine: one rank with its model, as the user sees it under `%%px`.

All ranks must make the same calls, except for `forward_single_layer`, which needs no other rank.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic_ns
from typing import Any, NamedTuple

from torch import Tensor

from dinfer.codec.choice import Codec
from dinfer.config import Config
from dinfer.engine.ahead import Ahead
from dinfer.engine.board import Board
from dinfer.engine.by_hand import LayerKV, Steps, layer_kv
from dinfer.engine.corruption import Alarm, Corruption
from dinfer.engine.decode_start import DecodeStart, GivenUp, record
from dinfer.engine.decoding import Decoding, cache_of, recheck
from dinfer.engine.finite import FiniteCheck, NonFinite, OnNonFinite
from dinfer.engine.kernels import Graphs
from dinfer.engine.lanes import Execution, LaneExecutor
from dinfer.engine.ops import largest_payload
from dinfer.engine.prefill import Prefill
from dinfer.engine.prompt import Hit, Prompt, Stands
from dinfer.engine.streams import StreamExecutor
from dinfer.engine.sync_layer import sync_block
from dinfer.engine.threads import ThreadExecutor
from dinfer.errors import ModelError, NotPossible
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.kernels.graphs import LayerGraphs
from dinfer.model.sampling import Sampler, Sampling
from dinfer.model.text import encode, load_tokenizer
from dinfer.plan.cut import Unit
from dinfer.plan.lower import lower
from dinfer.plan.ops import Op, PlanError
from dinfer.plan.partition import Shape, check_same_prefill, partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.plan.verify import verify
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder
from dinfer.transport.deadline import Deadline, StillWaiting
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import Comm
from dinfer.transport.streams import StreamComm

log = logging.getLogger("dinfer")

KV = tuple[Tensor, Tensor]
"""K and V, each [1, kv_heads, tokens, head_dim]"""


class PrefillResult(NamedTuple):
    """What `prefill_phase` returns and `decode_phase` takes: the normed hidden state of the prompt's last token,
    [1, 1, hidden_size], and K and V of every layer, views of this rank's cache."""

    hidden_states: Tensor
    kv_caches: list[KV]


class Engine:
    """One rank. Raises PlanError or ModelError for a prompt or plan that cannot run, before anything is sent.

    `memory`: shared memory for the recorder; by default each prompt gets its own. `deadline`: seconds after which a
    call that waits for other ranks raises StillWaiting. `on_op(event, op)` is called for every op that has ended,
    `on_hit` for a breakpoint's condition that holds, `on_corrupt` for a block whose bytes changed, and `on_nonfinite`
    for the first NaN or Inf. `graphs` run the layers; None: transformers' own kernels do. `all_stands()` returns where
    each rank stands, None where unknown.
    """

    def __init__(
        self,
        decoder: Decoder,
        comm: Comm,
        config: Config,
        *,
        gate: Gate | None = None,
        board: Board | None = None,
        memory: memoryview | None = None,
        on_op: Callable[[Event, Op], None] | None = None,
        deadline: float | None = None,
        on_hit: Hit | None = None,
        all_stands: Callable[[], Stands] | None = None,
        on_corrupt: Callable[[Corruption], None] | None = None,
        on_nonfinite: OnNonFinite = lambda _: None,
        graphs: Graphs | None = None,
    ) -> None:
        self.decoder, self.comm, self.config = decoder, comm, config
        self.rank, self.world_size = comm.rank, comm.world_size
        self.gate, self.board = gate or Gate(), board or Board()
        self._memory, self._on_op, self._on_hit, self._all_stands = memory, on_op, on_hit, all_stands
        self._on_nonfinite, self.graphs = on_nonfinite, graphs
        self._deadline = Deadline(comm.rank, deadline)
        self._alarm, self.check_s = Alarm(config.on_corruption, on_corrupt), 0.0
        self._prompt: Prompt | None = None
        self.recorder: Recorder | None = None
        self.cache: KVCache | None = None
        self.ids: list[int] = []
        self.chunk = 0

    # -- one prompt

    def plan_for(self, tokens: int) -> Plan:
        """The plan that this engine's config makes for so many tokens, lowered for streams."""
        return self._lowered(build(self._shape(tokens), self.config.schedule, self.config.sync_strategy))

    def prepare(self, ids: Sequence[int], *, plan: Plan | None = None) -> LaneExecutor:
        """Prepare a prompt: a verified plan, a KV cache, and lanes that wait at limit 0. Releases the previous prompt.

        Raises ModelError for a prompt that is too long, PlanError for a plan of another prefill or one that can hang
        (unless config.unsafe), and NotPossible if the previous prompt cannot be released.
        """
        if len(ids) > self.decoder.max_positions:
            raise ModelError(
                f"the prompt has {len(ids)} tokens; this model has {self.decoder.max_positions} positions: shorten it."
            )
        plan = self._lowered(plan) if plan else self.plan_for(len(ids))
        check_same_prefill(plan.shape, self._shape(len(ids)))
        verdict = verify(plan)
        if not verdict.proved and not self.config.unsafe:
            raise PlanError(f"{verdict}. Nothing was run; unsafe=True would run it all the same.")
        if not self.release():
            raise NotPossible(
                f"rank {self.rank}: lanes of the previous prompt are still blocked in a transfer and would take this "
                "prompt's messages."
            )
        self.ids, self.cache = list(ids), self.decoder.new_cache(self._capacity(len(ids)))
        lanes = [*(lane.name for lane in plan.lanes[self.rank]), "decode"]
        if self._memory is None:
            longest = max(len(lane.ops) for lane in plan.lanes[self.rank])
            self.recorder = Recorder(
                self.rank, lanes, 2 * max(longest, self.config.max_new_tokens) + self.decoder.num_layers + 64
            )
        else:
            self.recorder = Recorder.over(self.rank, lanes, self._memory)
            self.recorder.clear()
        noted = partial(_record_nonfinite, self.recorder)
        finite = FiniteCheck(self.rank, plan.shape, self.cache.device, noted, self._on_nonfinite)
        try:
            state = Prefill(
                self.decoder, self.cache, plan, self.rank, ids,
                digests=self.config.digests, alarm=self._alarm, finite=finite, graphs=self._graphs_for(plan),
                codec=Codec.of(self.config.codec),
            )  # fmt: skip
            self._prompt = Prompt(
                state, self._executor, on_op=self._on_op, on_hit=self._on_hit, all_stands=self._all_stands
            )
        except BaseException:
            finite.close()  # its thread would keep the KV
            raise
        self._prompt.executor.start()
        return self._prompt.executor

    @property
    def prompt(self) -> Prompt:
        """The current prompt. Raises NotPossible before the first one."""
        if self._prompt is None:
            raise NotPossible(
                "there is no prompt yet: call prefill_phase(prompt), or prepare(ids), on all ranks."
            )
        return self._prompt

    @property
    def kernels(self) -> str:
        """What runs the layers of the current prompt: "exact", "graph" or "compiled"."""
        return self.prompt.state.kernels

    @property
    def executor(self) -> LaneExecutor:
        """What runs the current prompt's lanes. Raises NotPossible before the first one."""
        return self.prompt.executor

    def prefill_phase(self, prompt: str | Sequence[int] | None = None) -> PrefillResult:
        """Run the prompt through all stages and send all its blocks to every rank. All ranks must call it.

        `prompt` is text or token ids; None: the prepared prompt. Raises OpFailed if an op of this rank fails,
        StillWaiting if no op ends for `deadline` seconds, and what `prepare` raises.
        """
        if prompt is not None:
            self.prepare(self.encode(prompt))
        executor = self.executor
        self.prompt.detect_edits()
        self.board.set_phase("prefill")
        before = None
        while not executor.run_to_end(self._deadline.seconds):
            if before == (before := executor.stand()):
                raise StillWaiting(
                    f"{self.prompt.blocked_on()}; there was no progress for {self._deadline.seconds:g} s. "
                    "Call prefill_phase on the other ranks too, then prefill_phase() here to go on."
                )
        if executor.state.final is None:
            raise NotPossible(
                f"the plan has ended, but rank {self.rank} has no final hidden state to decode from."
            )
        return PrefillResult(executor.state.final, self.kv_caches(len(self.ids)))

    def generate_phase(
        self, prompt: str | Sequence[int] | None = None, on_token: Callable[[int], None] | None = None
    ) -> list[int]:
        """`prefill_phase` and `decode_phase` in one; returns the new token ids. All ranks must call it.

        Decode does not wait for the end of prefill: the first token is chosen, and told, as soon as the final hidden
        state is here, and for the second a layer computes as soon as its blocks are. What is computed is the same, bit
        for bit. (One after the other they run on a GPU, with a lossy codec and with faults armed.)
        Raises what these two raise; the ranks' tokens are compared, and the rows of KV checked, once prefill has ended.
        """
        if prompt is not None:
            self.prepare(self.encode(prompt))
        executor = self.executor
        self.prompt.detect_edits()
        start = self.decode_start(self.config.max_new_tokens)
        if start is None:
            self.prefill_phase()
            return self.decode_phase(on_token=on_token)
        self.board.set_phase("prefill")
        executor.set_limits([len(lane.ops) for lane in executor.plan.lanes[self.rank]])
        try:
            start.run(on_token or (lambda _: None), self._deadline.seconds)
        except GivenUp:
            raise NotPossible(
                f"rank {self.rank}: the prompt was released, or changed, while it was on its way."
            ) from None
        self.prefill_phase()
        return self.decode_phase(on_token=on_token, start=start)

    def decode_start(self, max_new_tokens: int) -> DecodeStart | None:
        """A start of decode for while prefill runs; None where decode has to begin after it."""
        executor = self.executor
        state, config = executor.state, self.config
        # Transformers' own layers, on a cache that nothing changes once blocks have come; on a GPU an op ends when its
        # kernels are launched, and a block that is here may still be on its way.
        is_plain = state.kernels == "exact" and self.decoder.device.type == "cpu"
        if (
            not is_plain
            or config.uses_streams
            or state.faults.are_armed
            or Codec.of(config.codec).is_lossy
            or executor.is_done()
        ):
            return None
        assert self.cache is not None
        assert self.recorder is not None
        prompt, before = self.prompt, self.prompt.changes
        return DecodeStart(
            self.decoder, self.cache, executor, self.recorder, self._sampler(), max_new_tokens,
            lambda: prompt.changes == before,
        )  # fmt: skip

    def _sampler(self) -> Sampler:
        config = self.config
        return Sampler(Sampling(config.temperature, config.top_k, config.top_p, config.seed))

    def decoding(
        self,
        hidden_states: Tensor | None = None,
        kv_caches: Sequence[KV] | None = None,
        max_new_tokens: int | None = None,
        start: DecodeStart | None = None,
    ) -> Decoding:
        """A decode before its first step, from what `decode_phase` takes; a `start` that counts no more is left out.
        Raises NotPossible without a prefill."""
        if start is not None and not start.counts():  # asked before the cache grows, with all that is in it
            start = None
        final = self.executor.state.final if hidden_states is None else hidden_states
        unfinished = self._prompt is not None and not self._prompt.executor.is_done()
        if final is None or (kv_caches is None and (self.cache is None or unfinished)):
            raise NotPossible("there is no finished prefill: call prefill_phase(prompt) on all ranks first.")
        state = None
        if self._prompt is not None:
            self._prompt.state.coded.seal_all()
            self._prompt.state.finite.settle()  # the recorder's lane for decode is its own from here on
        if kv_caches is None:
            tokens = len(self.ids)
            cache = self.grow_cache(self._capacity(tokens, max_new_tokens))
            state = self._prompt.state if self._prompt else None
        else:
            tokens = kv_caches[0][0].shape[2] if kv_caches else 0
            cache = cache_of(self.decoder, kv_caches, self._capacity(tokens, max_new_tokens))
        has_exact_rows = state is not None and state.kernels == "exact"
        ahead = Ahead(*self.graphs) if self.graphs and not has_exact_rows else None
        return Decoding(
            self.decoder,
            cache,
            tokens,
            final[:, -1:],
            self._sampler(),
            self.comm,
            self.recorder,
            state,
            ahead,
            start,
        )

    def recheck(self) -> None:
        """Compare the prompt's KV rows with their digests; sets `check_s`, seconds. All ranks must call it.

        Raises Corrupted on all ranks if a row changed on any, unless on_corruption is "record".
        """
        if self._prompt is not None and self.recorder is not None:
            self.check_s = recheck(self._prompt.state, self.recorder, self.comm)

    def extend(self, decoding: Decoding, max_new_tokens: int) -> None:
        """Grow the cache of a decode of this prompt to `max_new_tokens` new tokens in all."""
        decoding.cache = self.grow_cache(self._capacity(len(self.ids), max_new_tokens))

    def grow_cache(self, capacity: int) -> KVCache:
        """The prompt's cache, copied into a larger one if it has fewer than `capacity` rows."""
        assert self.cache is not None
        if self.cache.capacity < capacity:
            self.cache = self.cache.moved(capacity, self.cache.capacity)
            if self._prompt is not None:
                self._prompt.state.cache = self.cache
                self._prompt.edits.accept_all()
        return self.cache

    def decode_phase(
        self,
        hidden_states: Tensor | None = None,
        kv_caches: Sequence[KV] | None = None,
        max_new_tokens: int | None = None,
        on_token: Callable[[int], None] | None = None,
        start: DecodeStart | None = None,
    ) -> list[int]:
        """Decode; returns the new token ids, the same on every rank. All ranks must call it.

        `hidden_states` and `kv_caches` are what `prefill_phase` returned on any engine; by default this engine's own,
        whose rows `recheck` checks first. `start`: what was computed, and told, while prefill ran. Stops before
        `max_new_tokens` where the text or the model's positions end. Raises TokensDiffer, NotANumber or Corrupted on
        all ranks, StillWaiting past the deadline.
        """
        if self._prompt is not None:
            self._prompt.detect_edits()
        decoding = self.decoding(hidden_states, kv_caches, max_new_tokens, start)
        told = start.first.token if start is not None and start.first is not None else None

        def decode() -> list[int]:
            self.board.set_phase("decode")
            if kv_caches is None:
                self.recheck()
            for token in decoding.run(max_new_tokens or self.config.max_new_tokens):
                self.board.set_phase("decode", len(decoding.tokens))
                if on_token and not (token == told and len(decoding.tokens) == 1):
                    on_token(token)
            if self._prompt is not None:
                self._prompt.edits.accept_all()
            return decoding.tokens

        tokens: list[int] = self._deadline.run("decode_phase", decode)
        return tokens

    # -- by hand

    def step(self, unit: Unit = "wave", timeout: float = 5.0) -> Steps:
        """Step by one unit: call it on all ranks, or on this one to run as far as it can alone.

        If it has not ended after `timeout` seconds, the result names the rank that it waits for; the next call goes on.
        """
        return self.prompt.step(unit, timeout)

    def where(self) -> str:
        """Where this rank stands, or which rank it waits for."""
        return self.prompt.blocked_on()

    def kv(self, layer: int) -> LayerKV:
        """K and V of a layer that this rank holds, as views: writing edits the cache. Raises PlanError."""
        self.executor.state.coded.seal_all()
        return layer_kv(self.executor, layer)

    @property
    def hidden(self) -> dict[tuple[int, int], Tensor]:
        """The hidden states here: (chunk, layer) → [1, tokens, hidden_size] before that layer. Assign to edit."""
        return self.executor.state.hidden

    # -- one layer

    def forward_single_layer(
        self,
        layer_idx: int,
        hidden_states: Tensor,
        *,
        position: int | None = None,
        cache: KVCache | None = None,
    ) -> dict[str, Any]:
        """Run one layer on this rank alone, without communication.

        `hidden_states` [1, tokens, hidden_size] are the tokens from `position` on (default: the start of `self.chunk`).
        Writes K and V into `cache` (default: the prompt's). Returns a dict of `hidden_states` (same shape), `kv_cache`
        (K and V of these tokens, each [1, kv_heads, tokens, head_dim]), `layer_idx` and `position`. Raises ModelError.
        """
        tokens = hidden_states.shape[1]
        start = self._chunk_start if position is None else position
        cache = cache or self.cache or self.decoder.new_cache(start + tokens)
        output = self.decoder.layer(layer_idx, hidden_states, cache, start)
        kv = (cache.k(layer_idx, start + tokens, start), cache.v(layer_idx, start + tokens, start))
        return {"layer_idx": layer_idx, "position": start, "hidden_states": output, "kv_cache": kv}

    def sync_single_layer_cache(self, layer_idx: int, kv_cache: KV | None = None) -> KV:
        """Send K and V of one layer for the current chunk (`self.chunk`) from its owner to every rank.

        All ranks must call it, while no lane runs. The owner passes `kv_cache`, K and V, each [1, kv_heads, tokens,
        head_dim]; the others pass None. Returns the pair on every rank, and writes it to the cache of a prepared
        prompt. Raises ValueError, the same on every rank and before anything is sent, if the ranks' calls do not match.
        """

        def sync() -> KV:
            owners, busy = self._shape(1).owners, self._prompt is not None and self._prompt.is_running()
            block, strategy = (self.chunk, layer_idx), self.config.sync_strategy
            kv = sync_block(self.comm, self.decoder, owners, strategy, block, kv_cache, busy=busy)
            if self.cache is not None:
                self.cache.write(layer_idx, self._chunk_start, *kv)
            return kv

        k, v = self._deadline.run(f"sync_single_layer_cache({layer_idx}, …)", sync)
        return k, v

    def _graphs_for(self, plan: Plan) -> LayerGraphs | None:
        """The graphs, if they run this plan's chunks, one layer after another: lanes of their own would share the
        buffers."""
        if self.graphs is None:
            return None
        layers, shape = self.graphs.layers, plan.shape
        if not layers.holds(max(map(len, shape.chunks)), shape.tokens):
            log.warning("kernels=exact: by this plan, chunks or prompt are longer than what was captured")
        elif sum(any(op.kind == "layer" for op in lane.ops) for lane in plan.lanes[self.rank]) > 1:
            log.warning("kernels=exact: by this plan, rank %d runs layers on several lanes", self.rank)
        elif Codec.of(self.config.codec).is_lossy:
            log.warning(
                "kernels=exact: codec %s is lossy, and prefill computes on KV of its own", self.config.codec
            )
        else:
            return layers
        return None

    def _lowered(self, plan: Plan) -> Plan:
        """The plan as the backend can run it: lowered for streams."""
        return lower(plan) if self.config.uses_streams and not plan.is_lowered else plan

    def _executor(
        self, state: Prefill, on_op: Callable[[Event, Op], None], watched: Callable[[Op], bool]
    ) -> LaneExecutor:
        assert self.recorder is not None
        given = Execution(state, self.comm, self.gate, self.recorder, self.board, on_op, watched)
        if not self.config.uses_streams:
            return ThreadExecutor(given)
        assert isinstance(self.comm, StreamComm), "the backend needs a transport with streams"
        return StreamExecutor(given, self.comm.open_streams(self.decoder.device, largest_payload(state)))

    def kv_caches(self, tokens: int) -> list[KV]:
        """K and V of every layer for the first `tokens` tokens, each [1, kv_heads, tokens, head_dim]: views."""
        assert self.cache is not None
        return [(self.cache.k(n, tokens), self.cache.v(n, tokens)) for n in range(self.cache.layers)]

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a text; a list of ids is returned as it is. Raises ModelError without a tokenizer."""
        if isinstance(prompt, str):
            return encode(load_tokenizer(self.decoder.spec.path), prompt, self.config.chat)
        return list(prompt)

    def release(self) -> bool:
        """Release the current prompt and its KV; False if a lane is still blocked: call it again later."""
        if self._prompt is not None and self._prompt.executor.close():
            self._prompt.state.free()
            self._prompt = self.cache = None
            if self.graphs:
                self.graphs.layers.unbind()
        return self._prompt is None

    def _shape(self, tokens: int) -> Shape:
        return partition(
            layers=self.decoder.num_layers,
            tokens=tokens,
            world_size=self.world_size,
            chunk_size=self.config.chunk_size,
            layer_split=self.config.layer_split or None,
        )

    @property
    def _chunk_start(self) -> int:
        chunks = self._prompt.plan.shape.chunks if self._prompt else ()
        return chunks[self.chunk].start if self.chunk < len(chunks) else self.chunk * self.config.chunk_size

    def _capacity(self, tokens: int, max_new_tokens: int | None = None) -> int:
        """The rows for a prompt and its new tokens, limited by the model's positions; faults may add rows."""
        faults = self._prompt.state.faults if self._prompt else None
        new = (max_new_tokens or self.config.max_new_tokens) * (2 if faults and faults.repeats else 1)
        return min(tokens + new, self.decoder.max_positions) + (faults.extra_rows if faults else 0)


def _record_nonfinite(recorder: Recorder, found: NonFinite) -> None:
    """Record an event on the recorder's lane for decode, which nothing else writes during prefill."""
    now, layer = monotonic_ns(), found.layer if found.op == "layer" else None
    what = "kv" if found.tensor in ("K", "V") else found.tensor
    record(recorder, "nonfinite", now, now, what=what, chunk=found.chunk, layer=layer)

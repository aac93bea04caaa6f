"""Engine: one rank with its model, as the user meets it under `%%px`.

All ranks make the same calls, but for `forward_single_layer`, which is this rank's alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from dinfer.config import Config
from dinfer.engine.admission import as_issued, capacity, check_length, check_plan, executor_for
from dinfer.engine.board import Board
from dinfer.engine.by_hand import LayerKV, Steps, layer_kv
from dinfer.engine.conditions import Hit
from dinfer.engine.corruption import Alarm, Tell
from dinfer.engine.decoding import Decoding, cache_of
from dinfer.engine.lanes import Execution, LaneExecutor
from dinfer.engine.prefill import Prefill
from dinfer.engine.prompt import Prompt, Stands, recorder_for
from dinfer.engine.recheck import recheck
from dinfer.engine.sync_layer import agree, sync_block
from dinfer.errors import NotPossible
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.sampling import Sampler, Sampling
from dinfer.model.text import encode, load_tokenizer
from dinfer.plan.cut import Unit
from dinfer.plan.ops import Op
from dinfer.plan.partition import Shape, partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder
from dinfer.transport.deadline import Deadline, StillWaiting
from dinfer.transport.gate import FreeGate, Gate
from dinfer.transport.gloo import Comm

KV = tuple[Tensor, Tensor]
"""K and V, each [1, kv_heads, tokens, head_dim]"""


class PrefillResult(NamedTuple):
    """`hidden_states`: the normed hidden state of the prompt's last token, [1, 1, hidden_size]; `kv_caches`:
    K and V of every layer, each [1, kv_heads, tokens, head_dim], views of this rank's cache.
    """

    hidden_states: Tensor
    kv_caches: list[KV]


class Engine:
    """One rank. Raises PlanError or ModelError for what cannot be run, before anything is sent.

    `memory` holds recorder records that another process may read; by default each prompt gets memory of its
    own. `deadline` bounds calls that wait for other ranks, in seconds: in a notebook, where some ranks may never make
    the call. `on_hit` and `others` are `Prompt`'s; `on_corrupt` is told of blocks whose bytes have changed.
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
        others: Callable[[], Stands] | None = None,
        on_corrupt: Tell | None = None,
    ) -> None:
        self.decoder, self.comm, self.config = decoder, comm, config
        self.rank, self.world_size = comm.rank, comm.world_size
        self.gate, self.board = gate or FreeGate(), board or Board()
        self._memory, self._on_op, self._on_hit, self._others = memory, on_op, on_hit, others
        self._deadline = Deadline(comm.rank, deadline)
        self._alarm, self.check_s = Alarm(config.on_corruption, on_corrupt), 0.0
        self._prompt: Prompt | None = None
        self.recorder: Recorder | None = None
        self.cache: KVCache | None = None
        self.ids: list[int] = []
        self.chunk = 0

    # -- one prompt

    def plan_for(self, tokens: int) -> Plan:
        """The plan for a prompt of that many tokens, by this engine's config."""
        plan = build(self._shape(tokens), self.config.schedule, self.config.sync_strategy)
        return as_issued(plan, self.config.backend)

    def prepare(self, ids: Sequence[int], *, plan: Plan | None = None) -> LaneExecutor:
        """Make a prompt ready: its plan, verified, its KV cache, and lanes that wait at limit 0.

        The prompt before it is given up, unless this one is refused. Raises PlanError or ModelError, and
        RuntimeError where the one before cannot be given up.
        """
        check_length(self.decoder, len(ids))
        plan = as_issued(plan, self.config.backend) if plan else self.plan_for(len(ids))
        check_plan(plan, self._shape(len(ids)), unsafe=self.config.unsafe)
        if not self.release():
            raise NotPossible(
                f"rank {self.rank} still has lanes of the prompt before this one blocked in a transfer: "
                "they would take this one's messages."
            )
        self.ids = list(ids)
        self.cache = self.decoder.new_cache(self._capacity(len(ids)))
        state = Prefill(
            self.decoder, self.cache, plan, self.rank, ids, digests=self.config.digests, alarm=self._alarm
        )
        self.recorder = recorder_for(plan, self.rank, self.config.max_new_tokens, self._memory)
        self._prompt = Prompt(
            plan, state, partial(self._execute, plan, state, self.recorder),
            on_op=self._on_op, on_hit=self._on_hit, others=self._others,
        )  # fmt: skip
        self._prompt.executor.start()
        return self._prompt.executor

    @property
    def prompt(self) -> Prompt:
        """The current prompt. Raises RuntimeError before there is one."""
        if self._prompt is None:
            raise NotPossible(
                "there is no prompt yet: call prefill_phase(prompt), or prepare(ids), on all ranks."
            )
        return self._prompt

    @property
    def executor(self) -> LaneExecutor:
        """The lanes of the current prompt. Raises RuntimeError before there is one."""
        return self.prompt.executor

    def prefill_phase(self, prompt: str | Sequence[int] | None = None) -> PrefillResult:
        """Run the prompt through all stages, and all its blocks to every rank.

        `prompt` is text or token ids; None: the one prepared.

        All ranks must call it. Raises OpFailed if this rank cannot go on.
        """
        if prompt is not None:
            self.prepare(self.encode(prompt))
        executor = self.executor
        self.prompt.enter_edits()
        self.board.set_phase("prefill")
        before = None
        while not executor.run_to_end(self._deadline.seconds):
            if before == (before := executor.stand()):
                raise StillWaiting(
                    f"{self.prompt.waits()}; there was no progress for {self._deadline.seconds:g} s. "
                    "Call prefill_phase on the other ranks too, then prefill_phase() here to go on."
                )
        if executor.state.final is None:
            raise NotPossible(
                f"the plan has ended, but gives rank {self.rank} no final state to decode from."
            )
        return PrefillResult(executor.state.final, self.kv_caches(len(self.ids)))

    def decoding(
        self,
        hidden_states: Tensor | None = None,
        kv_caches: Sequence[KV] | None = None,
        max_new_tokens: int | None = None,
    ) -> Decoding:
        """What `decode_phase` steps through; it has room for `max_new_tokens` (default: the config's)."""
        final = self.executor.state.final if hidden_states is None else hidden_states
        unfinished = self._prompt is not None and not self._prompt.executor.is_done()
        if final is None or (kv_caches is None and (self.cache is None or unfinished)):
            raise NotPossible("there is no finished prefill: call prefill_phase(prompt) on all ranks first.")
        state = self._prompt.state if self._prompt and kv_caches is None else None
        config = self.config
        if kv_caches is None:
            tokens = len(self.ids)
            cache = self.make_room(self._capacity(tokens, max_new_tokens))
        else:
            tokens = kv_caches[0][0].shape[2] if kv_caches else 0
            cache = cache_of(self.decoder, kv_caches, self._capacity(tokens, max_new_tokens))
        shape = state.plan.shape if state else None
        sampler = Sampler(Sampling(config.temperature, config.top_k, config.top_p, config.seed))
        final = final[:, -1:]
        return Decoding(self.decoder, cache, tokens, final, sampler, self.comm, self.recorder, shape, state)

    def recheck(self) -> None:
        """Look whether all rows of the prompt are still what was computed here or came, in `check_s` seconds. All ranks
        must call it. Raises Corrupted, on all ranks alike, unless on_corruption is "record"."""
        if self._prompt is not None and self.recorder is not None:
            self.check_s = recheck(self._prompt.state, self.recorder, self.comm)

    def extend(self, decoding: Decoding, max_new_tokens: int) -> None:
        """Give a decoding of this engine's prompt room for that many new tokens in all."""
        decoding.cache = self.make_room(self._capacity(len(self.ids), max_new_tokens))

    def make_room(self, capacity: int) -> KVCache:
        """The prompt's cache, moved to a larger one if it has less than that many rows."""
        assert self.cache is not None
        if self.cache.capacity < capacity:
            self.cache = self.cache.moved(capacity, self.cache.capacity)
            if self._prompt is not None:
                self._prompt.state.cache = self.cache
                self._prompt.edits.note_all()
        return self.cache

    def decode_phase(
        self,
        hidden_states: Tensor | None = None,
        kv_caches: Sequence[KV] | None = None,
        max_new_tokens: int | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[int]:
        """New tokens, the same on every rank; all ranks must call it. Raises TokensDiffer if they are not.

        `hidden_states` [1, 1, hidden_size] and `kv_caches` are what `prefill_phase` returned, on any engine;
        by default this engine's own. Fewer than `max_new_tokens` come where the text ends or the model's
        positions do. Of this engine's own KV all rows are checked first, as by `recheck`.
        """
        if self._prompt is not None:
            self._prompt.enter_edits()
        decoding = self.decoding(hidden_states, kv_caches, max_new_tokens)

        def decode() -> list[int]:
            self.board.set_phase("decode")
            if kv_caches is None:
                self.recheck()
            for token in decoding.run(max_new_tokens or self.config.max_new_tokens):
                self.board.set_phase("decode", len(decoding.tokens))
                if on_token:
                    on_token(token)
            if self._prompt is not None:
                self._prompt.edits.note_all()
            return decoding.tokens

        tokens: list[int] = self._deadline.run("decode_phase", decode)
        return tokens

    # -- by hand

    def step(self, unit: Unit = "wave", timeout: float = 5.0) -> Steps:
        """Go on by one unit: on all ranks by the same call, or on this one as far as it gets alone.

        Returns after at most `timeout` seconds; what was not reached by then is named, and goes on with the next call.
        """
        return self.prompt.step(unit, timeout)

    def where(self) -> str:
        """Where this rank stands, or whom it waits for."""
        return self.prompt.waits()

    def kv(self, layer: int) -> LayerKV:
        """What this rank holds of a layer's KV, as views that may be written to. Raises ValueError."""
        return layer_kv(self.executor, layer)

    @property
    def hidden(self) -> dict[tuple[int, int], Tensor]:
        """Hidden states at hand: [chunk, layer] → [1, tokens, hidden_size] before that layer. May be replaced."""
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
        """Run one layer on this rank alone; no communication.

        `hidden_states` [1, tokens, hidden_size] are the tokens from `position` on (default: the start of
        `chunk`). K and V go into `cache` (default: the prompt's). Returns `hidden_states` (same shape),
        `kv_cache` (K and V of these tokens, each [1, kv_heads, tokens, head_dim]), `layer_idx`, `position`.
        """
        tokens = hidden_states.shape[1]
        start = self._chunk_start() if position is None else position
        cache = cache or self.cache or self.decoder.new_cache(start + tokens)
        output = self.decoder.layer(layer_idx, hidden_states, cache, start)
        kv = (cache.k(layer_idx, start + tokens, start), cache.v(layer_idx, start + tokens, start))
        return {"layer_idx": layer_idx, "position": start, "hidden_states": output, "kv_cache": kv}

    def sync_single_layer_cache(self, layer_idx: int, kv_cache: KV | None = None) -> KV:
        """Give K and V of one layer for the current chunk to every rank.

        All ranks must call it, while no lane runs.

        The layer's owner passes `kv_cache`, K and V, each [1, kv_heads, tokens, head_dim]; the others pass
        None. All get the pair; where a prompt is prepared it is also written to its cache. Raises ValueError,
        the same on every rank and before anything is sent, if these calls do not fit together.
        """
        k, v = self._deadline.run(
            f"sync_single_layer_cache({layer_idx}, …)", lambda: self._sync(layer_idx, kv_cache)
        )
        return k, v

    def _sync(self, layer_idx: int, kv_cache: KV | None) -> KV:
        block = (self.chunk, layer_idx)
        owners, busy = self._shape(1).owners, self._prompt is not None and self._prompt.is_running()
        owner = agree(self.comm, self.decoder, owners, block, kv_cache, busy=busy)
        k, v = sync_block(self.comm, self.decoder, owner, self.config.sync_strategy, block, kv_cache)
        if self.cache is not None:
            self.cache.write(layer_idx, self._chunk_start(), k, v)
        return k, v

    # -- the rest

    def _execute(
        self, plan: Plan, state: Prefill, recorder: Recorder, on_op: Callable[[Event, Op], None]
    ) -> LaneExecutor:
        given = Execution(plan, state, self.comm, self.gate, recorder, self.board, on_op)
        return executor_for(self.config.backend, given)

    def kv_caches(self, tokens: int) -> list[KV]:
        """K and V of every layer for the first `tokens` tokens; views of this rank's cache."""
        assert self.cache is not None
        return [(self.cache.k(n, tokens), self.cache.v(n, tokens)) for n in range(self.cache.layers)]

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; ids pass as they are. Raises ModelError."""
        if isinstance(prompt, str):
            return encode(load_tokenizer(self.decoder.spec.path), prompt, self.config.chat)
        return list(prompt)

    def release(self) -> bool:
        """Give up the current prompt, with its KV; whether all its lanes ended. If not, it may be tried again."""
        if self._prompt is not None and self._prompt.executor.close():
            self._prompt.state.give_up()
            self._prompt = self.cache = None
        return self._prompt is None

    def _shape(self, tokens: int) -> Shape:
        return partition(
            layers=self.decoder.num_layers,
            tokens=tokens,
            world_size=self.world_size,
            chunk_size=self.config.chunk_size,
            layer_split=self.config.layer_split or None,
        )

    def _chunk_start(self) -> int:
        return self.chunk * self.config.chunk_size

    def _capacity(self, tokens: int, max_new_tokens: int | None = None) -> int:
        faults = self._prompt.state.faults if self._prompt else None
        return capacity(self.decoder, tokens, max_new_tokens or self.config.max_new_tokens, faults)

"""What each kind of op does: a table from op kind to function, and the state of one prefill on one rank.

Nothing here decides when an op runs; the executor does.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from time import monotonic_ns
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.engine.corruption import Alarm, Corruption
from dinfer.engine.faults import Faults
from dinfer.engine.ledger import UNKNOWN, Ledger
from dinfer.engine.probes import as_numbers
from dinfer.engine.transport.comm import Comm
from dinfer.engine.transport.ordering import Ordering
from dinfer.engine.transport.transfer import VOID, Header, TransferError, check, signature_of, signed
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.plan.graph import channel_of
from dinfer.plan.ops import FINAL, Op, Value
from dinfer.plan.plan import Plan


class Outcome(NamedTuple):
    """How an op ended.

    `met`: when its peer had come (monotonic ns; None: it has no peer); `bytes`: the size of its payload;
    `released`: it was a recv, and a void header released it instead; `corrupt`: what has arrived is not what was
    announced.
    """

    met: int | None = None
    bytes: int = 0
    released: bool = False
    corrupt: Corruption | None = None


class Prefill:
    """One prompt's state on one rank: KV cache, hidden states at hand, the final state.

    Hidden states that entered this rank (by embedding or from a peer) are kept, so that going back can
    compute anew from there; those in between go once every op that needs them has run. `digests`: keep a ledger;
    `alarm` is told of blocks that are not what they were.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        plan: Plan,
        rank: int,
        ids: Sequence[int],
        *,
        digests: bool = True,
        alarm: Alarm | None = None,
    ) -> None:
        self.decoder, self.cache, self.plan, self.rank = decoder, cache, plan, rank
        self.ids = list(ids)
        self.hidden: dict[tuple[int, int], Tensor] = {}
        self.final: Tensor | None = None
        self.ledger = Ledger(rank, on=digests)
        self.alarm = alarm or Alarm()
        self.differing: dict[tuple[int, int], str] = {}
        self.extra: dict[int, int] = {}
        """by layer: how many rows it holds beyond those that the plan made, where something is wrong"""
        self.ordering = Ordering(cache.device)
        own = [op for lane in plan.lanes[rank] for op in lane.ops]
        self.faults = Faults(self, own)
        self._entered = {v for op in own if op.kind in ("embed", "recv") for v in op.makes()}
        self._uses = Counter(need for op in own for need in op.needs() if need.what == "hidden")

    def give_up(self) -> None:
        """Let go of what takes memory: whoever still knows this prompt must not keep the next one from its KV."""
        self.cache, self.hidden, self.final = self.decoder.new_cache(1), {}, None

    def rows(self, chunk: int) -> range:
        """The token positions of a chunk."""
        return self.plan.shape.chunks[chunk]

    def block(self, chunk: int, layer: int) -> Tensor:
        """The block's place in the cache, [tokens, 2, kv_heads, head_dim]."""
        rows = self.rows(chunk)
        return self.cache.block(layer, rows.start, rows.stop)

    def use(self, chunk: int, layer: int) -> Tensor:
        """The hidden state before `layer`, [1, tokens, hidden_size], for one of the ops that need it."""
        value = Value("hidden", chunk, layer)
        self._uses[value] -= 1
        if self._uses[value] <= 0 and value not in self._entered:
            return self.hidden.pop((chunk, layer))
        return self.hidden[chunk, layer]

    def is_needed(self, chunk: int, layer: int) -> bool:
        """Whether an op that has not run needs that hidden state.

        After the last layer nobody does, but for the last chunk's.
        """
        return self._uses[Value("hidden", chunk, layer)] > 0

    def take_in(self, op: Op, announced: Tensor, block: Tensor) -> Tensor | None:
        """Put down what has arrived; its digests, int64 [2], where the signature `announced` is."""
        self.faults.on_wire(op, block)
        found = self.ledger.arrived((op.chunk, op.layer), block, announced)
        self.faults.in_memory(op, block)
        return found

    def judge(self, op: Op, came: Header, found: tuple[int, int] | None) -> Corruption | None:
        """Whether what has arrived, with these digests, is what its header announced."""
        self.differing.pop((op.chunk, op.layer), None)
        if found is None or came.digests in (UNKNOWN, found):
            return None
        changed = [name for name, one, other in zip("KV", came.digests, found, strict=True) if one != other]
        first = came.changed - 1 if came.changed else None
        corrupt = Corruption(
            self.rank, op.chunk, op.layer, " and ".join(changed), came.nbytes, op.peer, first
        )
        self.differing[op.chunk, op.layer] = corrupt.what
        return corrupt

    def take_edits(self, layers: Collection[int]) -> None:
        """The user may have changed KV of these layers, or hidden states, on the device's default stream."""
        self.ordering.forget()
        for chunk, layer in [key for key in self.ledger.entries if key[1] in layers]:
            self.ledger.edited((chunk, layer), self.block(chunk, layer))

    def compute_layer(self, chunk: int, layer: int, hidden: Tensor) -> Tensor:
        position, shift = self.rows(chunk).start, self.faults.shift(chunk, layer)
        output = self.decoder.layer(layer, hidden, self.cache, position)
        if shift:
            self.faults.note_right(chunk, layer, self.block(chunk, layer))
            output = self.decoder.layer(layer, hidden, self.cache, position, shift)
        return output

    def rewind(self, done: Iterable[Op], todo: Iterable[Op]) -> None:
        """Stand as if exactly the ops `done` had run.

        What `todo` needs and is not kept is computed anew from what entered.
        """
        done, todo = list(done), list(todo)
        made = {value for op in done for value in op.makes()}
        self.ordering.forget()
        self._uses = Counter(need for op in todo for need in op.needs() if need.what == "hidden")
        if FINAL not in made:
            self.final = None
        self.ledger.keep({(value.chunk, value.layer) for value in made if value.what == "kv"})
        self.faults.rewound(lambda chunk, layer: Value("kv", chunk, layer) in made, todo)
        self.hidden = {
            key: tensor for key, tensor in self.hidden.items() if self._keep(Value("hidden", *key), made)
        }
        for value in sorted(self._uses):
            if value in made and (value.chunk, value.layer) not in self.hidden:
                self._recompute(value.chunk, value.layer)

    def _keep(self, value: Value, made: set[Value]) -> bool:
        return value in made and (value in self._entered or self._uses[value] > 0)

    def _recompute(self, chunk: int, layer: int) -> None:
        entry = max(known for c, known in self.hidden if c == chunk and known < layer)
        hidden = self.hidden[chunk, entry]
        for index in range(entry, layer):
            block = self.block(chunk, index)
            as_it_is = block.clone()
            hidden = self.compute_layer(chunk, index, hidden)
            block.copy_(as_it_is)  # it may have been changed since it was made, by a fault or by hand
        self.hidden[chunk, layer] = hidden


def embed(state: Prefill, op: Op, _: Comm) -> Outcome:
    rows = state.rows(op.chunk)
    state.hidden[op.chunk, 0] = state.decoder.embed(state.ids[rows.start : rows.stop])
    return Outcome()


def layer(state: Prefill, op: Op, _: Comm) -> Outcome:
    hidden = state.use(op.chunk, op.layer)
    output = state.compute_layer(op.chunk, op.layer, hidden)
    block = state.block(op.chunk, op.layer)
    state.faults.computed(op, block)
    state.ledger.made((op.chunk, op.layer), block)
    state.faults.in_memory(op, block)
    if state.is_needed(op.chunk, op.layer + 1):
        state.hidden[op.chunk, op.layer + 1] = output
    state.ordering.launched(op.makes())
    return Outcome()


def norm(state: Prefill, op: Op, _: Comm) -> Outcome:
    state.final = state.decoder.norm(state.use(op.chunk, op.layer))[:, -1:].contiguous()
    return Outcome()


def send(state: Prefill, op: Op, comm: Comm) -> Outcome:
    with state.ordering.reading(op.value):
        payload, header = payload_of(state, op), header_at(state, op).pack()
        if op.what == "kv":
            header = signed(header, state.ledger.signature((op.chunk, op.layer)))
        met = comm.send(channel_of(comm.rank, op), header, payload)
    return Outcome(met, payload.nbytes)


def recv(state: Prefill, op: Op, comm: Comm) -> Outcome:
    channel = channel_of(comm.rank, op)
    data = comm.recv_header(channel)
    came, met = Header.unpack(data), monotonic_ns()
    if came.void:
        return Outcome(released=True)
    try:
        check(came, header_at(state, op), op)
    except TransferError:
        comm.recv_payload(channel, torch.empty(came.nbytes, dtype=torch.uint8))  # the channel stays usable
        raise
    place, corrupt = _place(state, op), None
    if op.what == "kv":
        with state.ordering.receiving(op.makes()):
            comm.recv_payload(channel, place)
            found = state.take_in(op, signature_of(data), place)
        corrupt = state.judge(op, came, None if found is None else as_numbers(found))
    else:
        comm.recv_payload(channel, place)
        _keep(state, op, place)
    return Outcome(met, place.nbytes, corrupt=corrupt)


HANDLERS: dict[str, Callable[[Prefill, Op, Comm], Outcome]] = {
    "embed": embed,
    "layer": layer,
    "norm": norm,
    "send": send,
    "recv": recv,
}


def void_header() -> bytes:
    """What releases a recv that was posted too early."""
    return VOID.pack()


def payload_of(state: Prefill, op: Op) -> Tensor:
    """What a send sends, contiguous. Raises TransferError if it is not as long as the plan says."""
    payload = _payload(state, op)
    tokens = payload.shape[0] if op.what == "kv" else payload.shape[1]
    if tokens != op.tokens:
        raise TransferError(f"at `{op}` the plan says {op.tokens} tokens, but {op.value} has {tokens}.")
    if payload.nbytes != (
        expected := header_at(state, op).nbytes
    ):  # a longer one would end the process that receives
        raise TransferError(
            f"at `{op}` {op.value} is {list(payload.shape)} in {payload.dtype}, {payload.nbytes:,} bytes in place of "
            f"{expected:,}: what was put in its place must have its shape and dtype."
        )
    return payload


def land(state: Prefill, op: Op) -> Tensor:
    """Where a recv is to write, made part of the state before it has come: for who orders all reads after it."""
    place = _place(state, op)
    _keep(state, op, place)
    return place


def header_at(state: Prefill, op: Op) -> Header:
    """What a transfer says of itself by the plan; both ends know it before."""
    decoder = state.decoder
    width = 2 * decoder.kv_heads * decoder.head_dim if op.what == "kv" else decoder.hidden_size
    dtype = str(decoder.dtype).removeprefix("torch.")
    nbytes = state.plan.expected_tokens(op) * width * decoder.dtype.itemsize
    return Header(state.plan.id, op.value, op.tokens, dtype, nbytes)


def _keep(state: Prefill, op: Op, place: Tensor) -> None:
    if op.what == "hidden":
        state.hidden[op.chunk, op.layer] = place
    elif op.what == "final":
        state.final = place


def _payload(state: Prefill, op: Op) -> Tensor:
    if op.what == "kv":
        return state.block(op.chunk, op.layer)
    if op.what == "final":
        assert state.final is not None
        return state.final
    return state.use(op.chunk, op.layer).contiguous()


def _place(state: Prefill, op: Op) -> Tensor:
    """Where a recv writes: blocks in place, hidden states into memory of their own."""
    if op.what == "kv":
        return state.block(op.chunk, op.layer)
    decoder = state.decoder
    tokens = 1 if op.what == "final" else len(state.rows(op.chunk))
    return torch.empty((1, tokens, decoder.hidden_size), dtype=decoder.dtype, device=decoder.device)

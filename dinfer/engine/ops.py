"""What each kind of op does: HANDLERS maps an op kind to its function. The executors decide when an op runs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic_ns
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.codec.choice import NONE
from dinfer.engine.coded import largest_bytes
from dinfer.engine.corruption import Corruption
from dinfer.engine.prefill import Prefill
from dinfer.kv.digests import as_numbers
from dinfer.plan.graph import channel_of
from dinfer.plan.ops import Op
from dinfer.transport.gloo import Comm
from dinfer.transport.header import Header, TransferError, check, signature_of, signed


class Outcome(NamedTuple):
    """How an op ended.

    `met`: when the peer was ready (monotonic ns; None: the op has no peer); `bytes`: payload size; `released`: a void
    header released this recv; `corrupt`: set if the block that arrived does not match its header's digests.
    """

    met: int | None = None
    bytes: int = 0
    released: bool = False
    corrupt: Corruption | None = None


def embed(state: Prefill, op: Op, _: Comm) -> Outcome:
    hidden = state.hidden[op.chunk, 0] = state.embed(op.chunk)
    state.finite.made(op, hidden)
    return Outcome()


def layer(state: Prefill, op: Op, _: Comm) -> Outcome:
    began = monotonic_ns()
    state.layer(op)
    state.ordering.launched(op.makes())
    state.faults.slow_layer((monotonic_ns() - began) / 1e9)
    return Outcome()


def norm(state: Prefill, op: Op, _: Comm) -> Outcome:
    state.final = state.decoder.norm(state.take_hidden(op.chunk, op.layer))[:, -1:].contiguous()
    state.finite.made(op, state.final)
    return Outcome()


def send(state: Prefill, op: Op, comm: Comm) -> Outcome:
    with state.ordering.reading(op.value):
        payload, header = message_of(state, op)
        met = comm.send(channel_of(comm.rank, op), header, payload)
    if op.what == "kv":
        state.coded.sent((op.chunk, op.layer))
    return Outcome(met, payload.nbytes)


def recv(state: Prefill, op: Op, comm: Comm) -> Outcome:
    channel = channel_of(comm.rank, op)
    data = comm.recv_header(channel)
    came, met = Header.unpack(data), monotonic_ns()
    if came.void:
        return Outcome(released=True)
    try:
        check(came, header_at(state, op, arriving=True), op)
    except TransferError:
        comm.recv_payload(channel, torch.empty(came.nbytes, dtype=torch.uint8))  # keeps the channel usable
        raise
    state.faults.slow_message(op)
    place, corrupt, meanwhile = _place(state, op), None, None
    if op.what == "kv":
        with state.ordering.receiving(op.makes()):
            if came.codec.is_none:
                comm.recv_payload(channel, place)
            else:
                coded = torch.empty(came.nbytes, dtype=torch.uint8)
                comm.recv_payload(channel, coded)
                meanwhile = partial(comm.ahead, channel, state.coded.most)
                meanwhile()
                state.coded.arrived((op.chunk, op.layer), coded, place)
                meanwhile()
            found = state.receive_decoded(op, signature_of(data), place, meanwhile)
        corrupt = state.check_digests(op, came, None if found is None else as_numbers(found))
    else:
        comm.recv_payload(channel, place)
        if op.what == "hidden":
            state.finite.made(op, place)
        _keep(state, op, place)
    return Outcome(met, came.nbytes, corrupt=corrupt)


HANDLERS: dict[str, Callable[[Prefill, Op, Comm], Outcome]] = {
    "embed": embed,
    "layer": layer,
    "norm": norm,
    "send": send,
    "recv": recv,
}


def message_of(state: Prefill, op: Op) -> tuple[Tensor, bytes]:
    """What a send sends, contiguous, and its header. Raises TransferError if its size is not the plan's."""
    payload, header = payload_of(state, op), header_at(state, op)
    if op.what != "kv":
        return payload, header.pack()
    key = op.chunk, op.layer
    if not header.codec.is_none:
        payload = state.coded.payload(key)
        header = replace(header, nbytes=payload.nbytes)
    return payload, signed(header.pack(), state.ledger.signature(key))


def payload_of(state: Prefill, op: Op) -> Tensor:
    """The tensor that a send sends, before a codec, contiguous. Raises TransferError if its size is not the plan's."""
    if op.what == "kv":
        payload = state.block(op.chunk, op.layer)
    elif op.what == "final":
        assert state.final is not None
        payload = state.final
    else:
        payload = state.take_hidden(op.chunk, op.layer).contiguous()
    tokens = payload.shape[0] if op.what == "kv" else payload.shape[1]
    if tokens != op.tokens:
        raise TransferError(f"`{op}` sends {op.tokens} tokens by the plan, but {op.value} has {tokens}.")
    expected = _nbytes(state, op)
    if payload.nbytes != expected:  # a longer one would abort the receiving process
        raise TransferError(
            f"`{op}`: {op.value} is {list(payload.shape)} in {payload.dtype}, {payload.nbytes:,} bytes instead of "
            f"{expected:,}: a replaced hidden state must keep its shape and dtype."
        )
    return payload


def land(state: Prefill, op: Op) -> Tensor:
    """Where a recv is to write, entered into the state before the data comes: streams order later reads behind it."""
    place = _place(state, op)
    _keep(state, op, place)
    return place


def header_at(state: Prefill, op: Op, *, arriving: bool = False) -> Header:
    """The header that the plan expects for a transfer; the same at both ends, but in a replay for blocks `arriving`."""
    codec = NONE
    if op.what == "kv":
        codec = state.coded.arriving if arriving else state.coded.codec
    nbytes = _nbytes(state, op) if codec.is_none else largest_bytes(codec, state.block(op.chunk, op.layer))
    dtype = str(state.decoder.dtype).removeprefix("torch.")
    return Header(state.plan.id, op.value, op.tokens, dtype, nbytes, codec=codec)


def _nbytes(state: Prefill, op: Op) -> int:
    """Bytes of what a transfer carries, before a codec."""
    decoder = state.decoder
    width = 2 * decoder.kv_heads * decoder.head_dim if op.what == "kv" else decoder.hidden_size
    return state.plan.expected_tokens(op) * width * decoder.dtype.itemsize


def largest_payload(state: Prefill) -> int:
    """The most bytes that a transfer of the plan may have, on any rank."""
    decoder, tokens = state.decoder, max(map(len, state.plan.shape.chunks))
    return tokens * max(2 * decoder.kv_heads * decoder.head_dim, decoder.hidden_size) * decoder.dtype.itemsize


def _place(state: Prefill, op: Op) -> Tensor:
    """Where a recv writes: a block into the cache, a hidden state into a new tensor."""
    if op.what == "kv":
        return state.block(op.chunk, op.layer)
    decoder = state.decoder
    tokens = 1 if op.what == "final" else len(state.rows(op.chunk))
    return torch.empty((1, tokens, decoder.hidden_size), dtype=decoder.dtype, device=decoder.device)


def _keep(state: Prefill, op: Op, place: Tensor) -> None:
    if op.what == "hidden":
        state.hidden[op.chunk, op.layer] = place
    elif op.what == "final":
        state.final = place

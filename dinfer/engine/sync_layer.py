"""`engine.sync_single_layer_cache`: send one block to every rank, outside any plan."""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from dinfer.config import SyncStrategy
from dinfer.model.decoder import Decoder
from dinfer.plan.graph import Channel
from dinfer.plan.ops import Value
from dinfer.plan.partition import within
from dinfer.plan.schedule import STRATEGIES
from dinfer.transport.gloo import Comm
from dinfer.transport.header import Header, TransferError

_CALL = struct.Struct("<qqq?")  # chunk, layer, tokens, whether lanes run


def sync_block(
    comm: Comm,
    decoder: Decoder,
    owners: Sequence[int],
    strategy: SyncStrategy,
    block: tuple[int, int],
    kv: tuple[Tensor, Tensor] | None,
    *,
    busy: bool,
) -> tuple[Tensor, Tensor]:
    """Pass `kv` of `block` (chunk, layer) from its owner to every rank; returns K and V, each [1, kv_heads, tokens,
    head_dim].

    `busy`: lanes run on this rank. Raises what `_agreed_owner` raises, and TransferError if a peer sends another block.
    """
    owner = _agreed_owner(comm, decoder, owners, block, kv, busy)
    shape, value = (2, decoder.kv_heads, decoder.head_dim), Value("kv", *block)
    rows = None if kv is None else torch.stack([kv[0][0], kv[1][0]]).permute(2, 0, 1, 3).contiguous()
    for source, target in STRATEGIES[strategy](owner, comm.world_size):
        channel = Channel("kv", source, target)
        if source == comm.rank:
            assert rows is not None
            comm.send(channel, _header(value, rows).pack(), rows)
        elif target == comm.rank:
            came = Header.unpack(comm.recv_header(channel))
            rows = torch.empty((came.tokens, *shape), dtype=decoder.dtype, device=decoder.device)
            expected = _header(value, rows)
            if came != expected:
                comm.recv_payload(channel, torch.empty(came.nbytes, dtype=torch.uint8))
                raise TransferError(f"rank {source} sent {came}; this rank expects {expected}.")
            comm.recv_payload(channel, rows)
    assert rows is not None
    return rows[:, 0].transpose(0, 1).unsqueeze(0), rows[:, 1].transpose(0, 1).unsqueeze(0)


def _header(value: Value, rows: Tensor) -> Header:
    """Its plan id is 0: no plan sends this block."""
    return Header(0, value, rows.shape[0], str(rows.dtype).removeprefix("torch."), rows.nbytes)


def _agreed_owner(
    comm: Comm,
    decoder: Decoder,
    owners: Sequence[int],
    block: tuple[int, int],
    kv: tuple[Tensor, Tensor] | None,
    busy: bool,
) -> int:
    """Exchange what each rank passed, and return the owner of `block`.

    Raises ValueError on every rank, before anything is sent, if lanes run or the ranks' calls do not match.
    """
    tokens = 0  # none were passed; -1: their shape or dtype is not this model's
    if kv is not None:
        tokens = kv[0].shape[2] if kv[0].ndim == 4 else 0
        wanted = (1, decoder.kv_heads, tokens, decoder.head_dim)
        if not tokens or any(t.shape != wanted or t.dtype != decoder.dtype for t in kv):
            tokens = -1
    calls = [_CALL.unpack(data) for data in comm.all_gather(_CALL.pack(*block, tokens, busy))]
    if running := [rank for rank, call in enumerate(calls) if call[3]]:
        raise ValueError(f"lanes run on ranks {running}: pause the prefill before syncing single layers.")
    if len({call[:2] for call in calls}) > 1:
        asked = "; ".join(f"rank {rank}: c{call[0]} l{call[1]}" for rank, call in enumerate(calls))
        raise ValueError(f"all ranks must sync the same block; they called with: {asked}.")
    layer = block[1]
    within("layer", layer, len(owners))
    owner, passed = owners[layer], [rank for rank, call in enumerate(calls) if call[2]]
    if passed != [owner] or calls[owner][2] < 0:
        form = f"[1, {decoder.kv_heads}, tokens, {decoder.head_dim}] in {decoder.dtype}"
        came = " in another shape or dtype" if passed == [owner] else ""
        raise ValueError(
            f"rank {owner} owns layer {layer}: pass kv_cache=(K, V) there, each {form}, and None on the other ranks; "
            f"it was passed on ranks {passed}{came}."
        )
    return owner

"""One block to every rank, outside any plan: what `sync_single_layer_cache` does."""

import torch
from torch import Tensor

from dinfer.config import SyncStrategy
from dinfer.engine.comm import Comm
from dinfer.engine.transfer import Header, TransferError
from dinfer.model.decoder import Decoder
from dinfer.plan.graph import Channel
from dinfer.plan.ops import Value
from dinfer.plan.sync import STRATEGIES

NO_PLAN = 0


def sync_block(
    comm: Comm,
    decoder: Decoder,
    owner: int,
    strategy: SyncStrategy,
    block: tuple[int, int],
    kv: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """K and V of `block` (chunk, layer), each [1, kv_heads, tokens, head_dim], on every rank; `kv` is theirs on the owner.

    Raises TransferError where a peer sends another block.
    """
    value = Value("kv", *block)
    rows = None if kv is None else torch.stack([kv[0][0], kv[1][0]]).permute(2, 0, 1, 3).contiguous()
    for source, target in STRATEGIES[strategy](owner, comm.world_size):
        channel = Channel("kv", source, target)
        if source == comm.rank:
            assert rows is not None
            header = Header(NO_PLAN, value, rows.shape[0], _dtype(rows), rows.nbytes)
            comm.send(channel, header.pack(), rows)
        elif target == comm.rank:
            rows = _receive(comm, decoder, channel, value)
    assert rows is not None
    return rows[:, 0].transpose(0, 1).unsqueeze(0), rows[:, 1].transpose(0, 1).unsqueeze(0)


def _receive(comm: Comm, decoder: Decoder, channel: Channel, value: Value) -> Tensor:
    came = Header.unpack(comm.recv_header(channel))
    rows = torch.empty((came.tokens, 2, decoder.kv_heads, decoder.head_dim), dtype=decoder.dtype, device=decoder.device)
    expected = Header(NO_PLAN, value, came.tokens, _dtype(rows), rows.nbytes)
    if came != expected:
        comm.recv_payload(channel, torch.empty(came.nbytes, dtype=torch.uint8))
        raise TransferError(f"rank {channel.source} synced {came}; this rank's call is for {expected}.")
    comm.recv_payload(channel, rows)
    return rows


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

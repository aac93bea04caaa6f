"""What a fault must leave behind, worked out from the clean bytes by other means than the engine's. Not a test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dinfer.engine.faults import order_of
from dinfer.plan.faults import Fault, TokenSizes
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import STRATEGIES

IN_PLACE = ("bitflip", "nan", "zero", "stale", "swap_kv", "permute", "lost", "head_shift", "cast")
MIDDLE = {torch.float32: 11, torch.bfloat16: 3, torch.float16: 5}
_WORDS = {4: np.uint32, 2: np.uint16}


def sizes_of(kv: Sequence[Tensor]) -> TokenSizes:
    """Of clean KV, by layer [tokens, 2, kv_heads, head_dim]."""
    return TokenSizes(kv[0].shape[2], kv[0].shape[3], str(kv[0].dtype).removeprefix("torch."))


def words(tensor: Tensor) -> np.ndarray:
    """A copy of its bytes as unsigned words, one a value."""
    raw = tensor.contiguous().view(torch.uint8).numpy().copy()
    return raw.view(_WORDS[tensor.element_size()]).reshape(tuple(tensor.shape))


def broken_block(fault: Fault, clean: Tensor, chunks: Sequence[range]) -> np.ndarray:
    """The block's words after the fault; `clean`: the layer's rows, [tokens, 2, kv_heads, head_dim]."""
    rows = chunks[fault.chunk]
    block = words(clean[rows.start : rows.stop])
    before = words(clean[: rows.start])
    sides = {"K": [0], "V": [1], None: [0, 1]}[fault.tensor]
    at = (0 if fault.token is None else fault.token - rows.start, sides[0], fault.head)
    match fault.kind:
        case "bitflip":
            bit = MIDDLE[clean.dtype] if fault.bit is None else fault.bit
            block[(*at, fault.dim or 0)] ^= block.dtype.type(1 << bit)
        case "nan":
            block[(*at, fault.dim or 0)] = words(torch.tensor([torch.nan], dtype=clean.dtype))[0]
        case "zero":
            block[at] = 0
        case "stale":
            fit = before[chunks[fault.chunk - 1].start :][: len(rows)]
            block[: len(fit), sides] = fit[:, sides]
        case "swap_kv":
            block = block[:, [1, 0]]
        case "permute":
            block[:, sides] = block[order_of(len(rows), fault.seed)][:, sides]
        case "lost":
            block[:] = 0
        case "head_shift":
            block[:, sides] = np.roll(block, 1, axis=2)[:, sides]
        case "cast":
            through = clean[rows.start : rows.stop].to(getattr(torch, str(fault.dtype))).to(clean.dtype)
            block[:, sides] = words(through)[:, sides]
    return block


def ranks_hit(fault: Fault, plan: Plan) -> set[int]:
    """Which ranks hold wrong bytes of the block, where it was armed before the block was made: `fault.rank` and all to
    which it passes the block on."""
    assert fault.rank is not None
    hit = {fault.rank}
    for source, target in STRATEGIES[plan.sync_strategy](plan.shape.owners[fault.layer], plan.world_size):  # type: ignore[index]
        hit |= {target} if source in hit else set()
    return hit


def in_shadow(fault: Fault, plan: Plan, chunk: int, layer: int) -> bool:
    """Whether that block may differ because the owner has computed it from wrong KV, or from a wrong hidden state."""
    if fault.rank != plan.shape.owners[fault.layer] or layer <= fault.layer:
        return False
    return chunk >= fault.chunk if fault.kind == "positions" else chunk > fault.chunk

"""Breakage: what each kind of fault does to the bytes of a block, in place. Nothing here knows ranks or moments."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.plan.faults import Fault, middle_bit

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Scene(NamedTuple):
    """`block` [tokens, 2, kv_heads, head_dim]; `row`: where the fault's token is in it; `before`: the block of the
    chunk before, where there is one."""

    block: Tensor
    row: int
    before: Tensor | None


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def differing(one: Tensor, other: Tensor) -> int:
    """How many values differ in their bits. Waits for the device."""
    return int((bits(one) != bits(other)).sum())


def order_of(tokens: int, seed: int) -> list[int]:
    """Which token takes each one's place: drawn, and never all their own."""
    drawn = random.Random(seed).sample(range(tokens), tokens)
    return drawn if drawn != sorted(drawn) else drawn[1:] + drawn[:1]


def _bitflip(fault: Fault, scene: Scene) -> None:
    words = bits(_part(fault, scene.block))
    highest = 8 * words.element_size() - 1
    bit = middle_bit(str(scene.block.dtype).removeprefix("torch.")) if fault.bit is None else fault.bit
    words[scene.row, 0, fault.head, fault.dim or 0] ^= -(1 << bit) if bit == highest else 1 << bit


def _nan(fault: Fault, scene: Scene) -> None:
    _part(fault, scene.block)[scene.row, 0, fault.head, fault.dim or 0] = torch.nan


def _zero(fault: Fault, scene: Scene) -> None:
    _part(fault, scene.block)[scene.row, 0, fault.head] = 0


def _stale(fault: Fault, scene: Scene) -> None:
    assert scene.before is not None
    rows = min(len(scene.block), len(scene.before))
    _part(fault, scene.block)[:rows] = _part(fault, scene.before)[:rows]


def _swap_kv(_: Fault, scene: Scene) -> None:
    scene.block.copy_(scene.block.flip(1))


def _permute(fault: Fault, scene: Scene) -> None:
    part = _part(fault, scene.block)
    part.copy_(part[order_of(len(part), fault.seed)])


def _lost(_: Fault, scene: Scene) -> None:
    scene.block.zero_()


def _head_shift(fault: Fault, scene: Scene) -> None:
    part = _part(fault, scene.block)
    part.copy_(part.roll(1, dims=2))


def _cast(fault: Fault, scene: Scene) -> None:
    part = _part(fault, scene.block)
    part.copy_(part.to(getattr(torch, str(fault.dtype))).to(part.dtype))


BREAKS: dict[str, Callable[[Fault, Scene], None]] = {
    "bitflip": _bitflip,
    "nan": _nan,
    "zero": _zero,
    "stale": _stale,
    "swap_kv": _swap_kv,
    "permute": _permute,
    "lost": _lost,
    "head_shift": _head_shift,
    "cast": _cast,
}
"""those that change a block where it lies; for the others see engine/faults"""


def _part(fault: Fault, block: Tensor) -> Tensor:
    """K or V of it, or both: [tokens, 1 or 2, kv_heads, head_dim]."""
    return block[:, {"K": slice(0, 1), "V": slice(1, 2), None: slice(0, 2)}[fault.tensor]]

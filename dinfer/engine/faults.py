"""Faults armed on one rank: when each strikes, and what it does to a block.

Most kinds change a block in place (`_damage`). Three others are `append_twice`, which moves the rows behind it,
`positions`, which runs the layer with wrong positions, and `repeat_row`, which strikes in decode. A slow link or rank
changes nothing, but takes time.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from time import sleep
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dinfer.model.cache import KVCache
from dinfer.plan.faults import SLOW, Fault, FaultPlace, middle_bit
from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The same memory viewed as integers."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def differing(one: Tensor, other: Tensor) -> int:
    """How many values differ in their bits. Waits for the device."""
    return int((bits(one) != bits(other)).sum())


def order_of(tokens: int, seed: int) -> list[int]:
    """A random order of `tokens` rows, drawn with `seed`; never the identity."""
    drawn = random.Random(seed).sample(range(tokens), tokens)
    return drawn if drawn != sorted(drawn) else drawn[1:] + drawn[:1]


def _damage(fault: Fault, block: Tensor, row: int, before: Tensor | None) -> None:
    """Change a block, [tokens, 2, kv_heads, head_dim], in place. `row`: the row of the fault's token; `before`: the
    block of the previous chunk, if there is one."""
    sides = {"K": slice(0, 1), "V": slice(1, 2), None: slice(0, 2)}[fault.tensor]
    part, dim = block[:, sides], fault.dim or 0  # [tokens, 1 or 2, kv_heads, head_dim]
    match fault.kind:
        case "bitflip":
            words = bits(part)
            highest = 8 * words.element_size() - 1
            bit = middle_bit(str(block.dtype).removeprefix("torch.")) if fault.bit is None else fault.bit
            words[row, 0, fault.head, dim] ^= -(1 << bit) if bit == highest else 1 << bit
        case "nan":
            part[row, 0, fault.head, dim] = torch.nan
        case "zero":
            part[row, 0, fault.head] = 0
        case "stale":
            assert before is not None
            rows = min(len(block), len(before))
            part[:rows] = before[:rows, sides]
        case "swap_kv":
            block.copy_(block.flip(1))
        case "permute":
            part.copy_(part[order_of(len(part), fault.seed)])
        case "lost":
            block.zero_()
        case "head_shift":
            part.copy_(part.roll(1, dims=2))
        case "cast":
            part.copy_(part.to(getattr(torch, str(fault.dtype))).to(part.dtype))


class Strike(NamedTuple):
    """Fault `number` has struck: how many values changed, and a text for the user."""

    number: int
    changed: int
    found: str


OnStrike = Callable[[Strike], None]


class Appended(NamedTuple):
    """Fault `number` inserted `rows` duplicate rows into a layer at row `start`."""

    number: int
    layer: int
    start: int
    rows: int


class PrefillState(Protocol):
    """What faults use of a prompt's state on one rank (`Prefill`); `extra`: rows beyond the plan's, by layer."""

    rank: int
    cache: KVCache
    plan: Plan
    extra: dict[int, int]

    def rows(self, chunk: int) -> range:
        """The token positions of a chunk."""


class Faults:
    """The faults armed on one rank, whose ops are `ops`. They call it on their lanes' threads with the block that they
    made, a view of the cache, [tokens, 2, kv_heads, head_dim]."""

    def __init__(self, state: PrefillState, ops: Iterable[Op]) -> None:
        self._state = state
        self._armed: tuple[Fault, ...] = ()
        self._on_strike: OnStrike = lambda _: None
        self._struck: set[int] = set()
        self._appended: list[Appended] = []
        self._right: dict[tuple[int, int], Tensor] = {}
        """blocks that a layer op made with the right positions, to compare with those of the wrong ones"""
        self._left = _by_layer(ops)
        """how many ops have yet to read or write each layer's blocks"""
        self._lock = threading.Lock()

    def arm(self, faults: Sequence[Fault], on_strike: OnStrike) -> None:
        """Arm these faults and disarm all others. `on_strike` is called for each strike, on any thread."""
        self._on_strike = on_strike
        self._armed = tuple(one for one in faults if one.rank in (None, self._state.rank))

    def strike_existing(self, holds: Callable[[int, int], bool]) -> None:
        """Let memory faults strike blocks that the rank holds already, by `holds(chunk, layer)`. No lane may run."""
        for one in self._armed:
            if one.where != "memory" or one.number in self._struck:
                continue
            if one.kind == "append_twice":
                self._append_where_due(one)
            elif holds(one.chunk, one.layer):
                self._strike(one, self._rows(one.chunk, one.layer))

    @property
    def extra_rows(self) -> int:
        """The most rows that faults have added, or will add, to one layer."""
        here = Counter[int]()
        for appended in self._appended:
            here[appended.layer] += appended.rows
        for one in self._appending():
            here[one.layer] += len(self._state.rows(one.chunk))
        return max(here.values(), default=0)

    @property
    def are_armed(self) -> bool:
        """Whether any fault that changes bytes is armed on this rank."""
        return any(one.kind not in SLOW for one in self._armed)

    def slow_message(self, op: Op) -> None:
        """A message has begun to arrive: wait as long as a slow link takes."""
        for one in self._armed:
            if one.kind == "slow link" and one.source == op.peer and one.ms:
                self._wait(one, one.ms / 1e3)

    def slow_layer(self, took_s: float) -> None:
        """A layer op has taken so long: wait as long as a slow rank would have taken more."""
        for one in self._armed:
            if one.kind == "slow rank":
                self._wait(one, one.ms / 1e3 if one.ms else took_s * ((one.factor or 1) - 1))

    def _wait(self, fault: Fault, seconds: float) -> None:
        """On the lane's thread, without the GIL. Reported once."""
        with self._lock:
            is_first = fault.number not in self._struck
            self._struck.add(fault.number)
        if is_first:
            self._on_strike(Strike(fault.number, 0, fault.slowness))
        sleep(seconds)

    def computed(self, op: Op, block: Tensor) -> None:
        """A layer op has written its block; its digests are not taken yet."""
        self._strike_at("compute", op, block)

    def on_wire(self, op: Op, block: Tensor) -> bool:
        """A recv has written its block; its digests are not taken yet. Returns whether a fault has struck it."""
        return self._strike_at("wire", op, block)

    def in_memory(self, op: Op, block: Tensor) -> None:
        """The rank holds the block and its digests are taken."""
        self._strike_at("memory", op, block)

    def _strike_at(self, where: FaultPlace, op: Op, block: Tensor) -> bool:
        due = [one for one in self._armed if one.where == where and one.is_at(op.chunk, op.layer)]
        due = [one for one in due if one.kind != "append_twice"]
        for one in due:
            self._strike(one, block)
        return bool(due)

    def ended(self, op: Op) -> bool:
        """An op has ended. Appends duplicate rows to its layer if a fault is due there; returns whether it did.

        It is due once no op of this rank reads or writes that layer any more, so what is sent stays intact.
        """
        if not _is_of_kv(op):
            return False
        with self._lock:
            self._left[op.layer] -= 1
            if self._left[op.layer]:
                return False
        due = [one for one in self._appending() if one.layer == op.layer]
        for one in due:
            self._append_where_due(one)
        return bool(due)

    def shift(self, chunk: int, layer: int) -> int:
        """The offset of the positions with which the layer is to run; 0 without such a fault."""
        return int(any(one.kind == "positions" and one.is_at(chunk, layer) for one in self._armed))

    def note_right(self, chunk: int, layer: int, block: Tensor) -> None:
        """Keep the block that the layer makes with the right positions."""
        self._right[chunk, layer] = block.clone()

    def rewound(self, holds: Callable[[int, int], bool], todo: Iterable[Op]) -> None:
        """The rank has gone back and `todo` is ahead of it: faults of blocks that are made again strike again."""
        self._left = _by_layer(todo)
        for appended in self._appended[::-1]:
            if self._left[appended.layer]:
                # Take its rows out again.
                buffer, extra = self._state.cache.tensor(appended.layer), self._state.extra
                buffer[appended.start : -appended.rows] = buffer[appended.start + appended.rows :].clone()
                self._appended.remove(appended)
                extra[appended.layer] -= appended.rows
                if not extra[appended.layer]:
                    del extra[appended.layer]
        here = {one.number for one in self._appended}
        for one in self._armed:
            if one.kind not in SLOW and not (
                one.number in here if one.kind == "append_twice" else holds(one.chunk, one.layer)
            ):
                self._struck.discard(one.number)

    @property
    def repeats(self) -> bool:
        """Whether a repeat_row fault is armed: each new row is appended twice."""
        return any(one.kind == "repeat_row" for one in self._armed)

    def new_row(self, row: int) -> int:
        """Decode has written a new row at `row` of every layer. Returns how many rows it counts for: 2 if repeated."""
        found = [one for one in self._armed if one.kind == "repeat_row"]
        if not found:
            return 1
        changed = 0
        for layer in range(self._state.cache.layers):
            at = row + self._state.extra.get(layer, 0)
            rows = self._state.cache.block(layer, at, at + 2)
            changed += differing(rows[:1], rows[1:])
            rows[1] = rows[0]
        said = f"row {row} of every layer is there twice, and so is each after it"
        for one in found:
            if one.number not in self._struck:
                self._report(one, changed, said)
        return 2

    def _strike(self, fault: Fault, block: Tensor) -> None:
        rows = self._state.rows(fault.chunk)
        if fault.kind == "positions":
            before = self._right.pop((fault.chunk, fault.layer))
        else:
            before = block.clone()
            row = 0 if fault.token is None else fault.token - rows.start
            stale = self._rows(fault.chunk - 1, fault.layer) if fault.chunk else None
            _damage(fault, block, row, stale)
        changed = differing(before, block)
        self._report(fault, changed, f"{changed:,} of {block.numel():,} values changed")

    def _append_where_due(self, fault: Fault) -> None:
        """Insert the block's rows a second time right behind it, if no op needs the layer any more."""
        if self._left[fault.layer]:
            return
        rows = len(self._state.rows(fault.chunk))
        start = self._stop(fault.chunk, fault.layer)
        buffer = self._state.cache.tensor(fault.layer)
        before = buffer.clone()
        buffer[start + rows :] = before[start:-rows]
        buffer[start : start + rows] = before[start - rows : start]
        self._appended.append(Appended(fault.number, fault.layer, start, rows))
        extra = self._state.extra[fault.layer] = self._state.extra.get(fault.layer, 0) + rows
        held = self._state.plan.shape.tokens + extra
        found = f"rank {self._state.rank} now holds {held} rows of the prompt in layer {fault.layer}"
        self._report(fault, differing(before, buffer), found)

    def _rows(self, chunk: int, layer: int) -> Tensor:
        """The block where it lies now, behind rows inserted before it."""
        stop = self._stop(chunk, layer)
        return self._state.cache.block(layer, stop - len(self._state.rows(chunk)), stop)

    def _stop(self, chunk: int, layer: int) -> int:
        stop = self._state.rows(chunk).stop
        for one in self._appended:
            if one.layer == layer and one.start < stop:
                stop += one.rows
        return stop

    def _appending(self) -> list[Fault]:
        """The append_twice faults that have yet to strike."""
        return [one for one in self._armed if one.kind == "append_twice" and one.number not in self._struck]

    def _report(self, fault: Fault, changed: int, found: str) -> None:
        self._struck.add(fault.number)
        self._on_strike(Strike(fault.number, changed, found if changed else "struck, but changed no byte"))


def _is_of_kv(op: Op) -> bool:
    return op.kind == "layer" or (op.is_transfer and op.what == "kv")


def _by_layer(ops: Iterable[Op]) -> Counter[int]:
    """How many of the ops read or write each layer's blocks."""
    return Counter(op.layer for op in ops if _is_of_kv(op))

"""NaN and Inf where they arise: every op that computes on a rank, and every hidden state that arrives, is looked at.

Digests cannot show them: ranks that hold the same NaN hold the same bytes. A NaN spreads to later layers and, through
attention, to later tokens, so the first one of a rank says most; what follows it is only counted.

On a CPU what an op has made is summed, at a small fraction of the cost of its digests. A sum is finite unless a value
is not, or unless it overflows, which a second look rules out. On CUDA the largest absolute value of each token is
computed and copied to the host on the stream of the op, and a thread reads it there: neither lane nor device waits.
"""

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from queue import Queue, SimpleQueue
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from dinfer.plan.ops import Op, OpKind

log = logging.getLogger("dinfer")

BUFFERS = 256
"""most ops whose values are on their way to the host: more than are issued ahead of those that have ended"""


@dataclass(frozen=True)
class NonFinite:
    """The first NaN or Inf in what an op made on `rank`. `tensor`: where it is; of `hidden`, in the hidden state that
    the op made or received. `token`: its position in the prompt, the first of those that have one."""

    rank: int
    op: OpKind
    chunk: int
    layer: int
    tensor: Literal["K", "V", "hidden", "final"]
    value: Literal["NaN", "Inf"]
    token: int

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts what has spread behind that from which it came: by layer, chunk and rank."""
        depth = 2 * self.layer + 1
        if self.op == "embed":
            depth = 0
        elif self.tensor == "hidden":
            depth += -1 if self.op == "recv" else 1
        return depth, self.chunk, self.rank

    @property
    def where(self) -> str:
        """The tensor, for example `K of c1 l3`."""
        block = f"c{self.chunk} l{self.layer}"
        match self.op:
            case "embed":
                return f"the embedding of c{self.chunk}"
            case "recv":
                return f"the hidden state before {block}"
            case "norm":
                return "the final hidden state"
        return f"the hidden state after {block}" if self.tensor == "hidden" else f"{self.tensor} of {block}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The inverse of `as_dict`."""
        return cls(**values)

    def __str__(self) -> str:
        """For example `NaN in K of c1 l3, token 17, computed by rank 1`."""
        how = f"as rank {self.rank} received it" if self.op == "recv" else f"computed by rank {self.rank}"
        return f"{self.value} in {self.where}, token {self.token}, {how}"


OnNonFinite = Callable[[NonFinite], None]


class FiniteCheck:
    """Looks for NaN and Inf in what the ops of one prompt make on one rank; they call it on their lanes' threads.

    `chunks`: the token positions of each chunk. `record` is called for each op that has made any, one call at a time;
    `report` for the first one alone, and again once the rank has gone back before it. Both may be called on any thread.
    """

    def __init__(
        self,
        rank: int,
        chunks: Sequence[range],
        device: torch.device,
        record: OnNonFinite,
        report: OnNonFinite,
    ) -> None:
        self._rank, self._chunks, self._record, self._report = rank, chunks, record, report
        self._first: tuple[OpKind, int, int] | None = None
        self._lock = threading.Lock()
        longest = max(map(len, chunks))
        self._reader = _DeviceReader(device, longest, self._look_at) if device.type == "cuda" else None

    def made(self, op: Op, hidden: Tensor, block: Tensor | None = None) -> None:
        """The op has made a hidden state, [1, tokens, hidden_size], and a block, [tokens, 2, kv_heads, head_dim]."""
        if self._reader is not None:
            self._reader.read(op, hidden, block)
        elif not (_has_finite_sum(hidden) and (block is None or _has_finite_sum(block))):
            tokens = hidden.shape[1]
            out = torch.empty(tokens if block is None else 3 * tokens)
            self._look_at(op, tokens, largest_values(hidden, block, out))

    @property
    def has_found(self) -> bool:
        """Whether an op that has made any has not been undone since."""
        with self._lock:
            return self._first is not None

    def rewound(self, done: Collection[Op]) -> None:
        """The rank has gone back: exactly the ops `done` have run."""
        self.settle()
        with self._lock:
            if self._first and self._first not in {(op.kind, op.chunk, op.layer) for op in done}:
                self._first = None

    def settle(self) -> None:
        """Wait until all that has been made so far has been looked at."""
        if self._reader is not None:
            self._reader.settle()

    def close(self) -> None:
        """No op will make anything any more."""
        if self._reader is not None:
            self._reader.close()

    def _look_at(self, op: Op, tokens: int, largest: Tensor) -> None:
        """`largest` as from `largest_values`, on the host."""
        if largest.isfinite().all():
            return
        hidden, kv = largest[:tokens], largest[tokens:].view(-1, 2)
        made = {"K": kv[:, 0], "V": kv[:, 1], "final" if op.kind == "norm" else "hidden": hidden}
        bad = {name: values.isfinite().logical_not_() for name, values in made.items()}
        tensor: Any = next(name for name, rows in bad.items() if rows.any())
        row = int(bad[tensor].int().argmax())
        chunk = self._chunks[op.chunk]
        token = chunk.stop - 1 if op.kind == "norm" else chunk.start + row
        value: Any = "NaN" if made[tensor][row].isnan() else "Inf"
        found = NonFinite(self._rank, op.kind, op.chunk, op.layer, tensor, value, token)
        with self._lock:
            self._record(found)
            is_first, place = self._first is None, (op.kind, op.chunk, op.layer)
            self._first = self._first or place
        if is_first:
            log.warning("%s", found)
            self._report(found)


def largest_values(hidden: Tensor, block: Tensor | None, out: Tensor) -> Tensor:
    """The largest absolute value of each token, NaN where one of them is NaN: float32, `out`.

    First those of `hidden`, [1, tokens, hidden_size], then of K and V of `block`, [tokens, 2, kv_heads, head_dim],
    token by token. Does not wait for the device.
    """
    tokens = hidden.shape[1]
    _largest(hidden[0], out[:tokens])
    if block is not None:
        _largest(block.flatten(2), out[tokens:].view(tokens, 2))
    return out


def _largest(values: Tensor, out: Tensor) -> None:
    torch.linalg.vector_norm(values, inf, dim=-1, dtype=torch.float32, out=out)


def _has_finite_sum(values: Tensor) -> bool:
    """False where a value is not finite, and where the sum overflows float32."""
    return isfinite(values.sum(dtype=torch.float32))


class _Copy(NamedTuple):
    """Values of an op on their way to the host; `arrived`: when they are there."""

    op: Op
    tokens: int
    size: int
    buffers: tuple[Tensor, Tensor]
    arrived: torch.cuda.Event


class _DeviceReader:
    """Copies the largest values of each op to the host and calls `look_at` with them on a thread of its own."""

    def __init__(self, device: torch.device, tokens: int, look_at: Callable[[Op, int, Tensor], None]) -> None:
        self._look_at, self._closed = look_at, False
        host = torch.empty((BUFFERS, 3 * tokens), pin_memory=True)
        on_device = torch.empty_like(host, device=device)
        # The memory may have been another tensor's until now, and any stream may use it first.
        torch.cuda.current_stream(device).synchronize()
        self._free: SimpleQueue[tuple[Tensor, Tensor]] = SimpleQueue()
        for buffers in zip(on_device, host, strict=True):
            self._free.put(buffers)
        self._copies: Queue[_Copy | None] = Queue()
        threading.Thread(target=self._run, name="dinfer NaN and Inf", daemon=True).start()

    def read(self, op: Op, hidden: Tensor, block: Tensor | None) -> None:
        """Called on the stream of the op."""
        tokens = hidden.shape[1]
        size = tokens if block is None else 3 * tokens
        buffers = self._free.get()
        on_device, host = (buffer[:size] for buffer in buffers)
        host.copy_(largest_values(hidden, block, on_device), non_blocking=True)
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(on_device.device))
        self._copies.put(_Copy(op, tokens, size, buffers, arrived))

    def settle(self) -> None:
        if not self._closed:
            self._copies.join()

    def close(self) -> None:
        self._closed = True
        self._copies.put(None)

    def _run(self) -> None:
        while (copy := self._copies.get()) is not None:
            try:
                copy.arrived.synchronize()
                self._look_at(copy.op, copy.tokens, copy.buffers[1][: copy.size])
            except Exception:  # a device that fails also fails the op; this thread must not block its lanes
                log.exception("what `%s` made could not be looked at", copy.op)
            finally:
                self._free.put(copy.buffers)
                self._copies.task_done()

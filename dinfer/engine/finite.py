"""NaN and Inf where they arise: every op that computes on a rank, and every hidden state that arrives, is looked at.

Digests cannot show them: ranks that hold the same NaN hold the same bytes. A NaN spreads to later layers and, through
attention, to later tokens, so the first one of a rank says most; what follows it is only counted.

On a CPU what an op has made is summed, at a small fraction of the cost of its digests. A sum is finite unless a value
is not, or unless it overflows, which a second look rules out. On CUDA the largest absolute value of each token is kept
on the device, by a kernel of the op's own or by the op's graph. A thread looks there now and then, at all that has come
together: neither lane nor device waits.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any, Literal, Self

import torch
from torch import Tensor

from dinfer.plan.ops import Op, OpKind
from dinfer.plan.partition import Shape

log = logging.getLogger("dinfer")

PAUSE_S = 0.01
"""seconds between two looks at the device: each takes the GIL from the lanes"""

LONGEST_PAUSE_S = 1.0
"""seconds after which an op is looked at for sure"""


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

    `shape`: of the prompt. `record` is called for each op that has made any, one call at a time; `report` for the first
    one alone, and again once the rank has gone back before it. Both may be called on any thread.
    """

    def __init__(
        self, rank: int, shape: Shape, device: torch.device, record: OnNonFinite, report: OnNonFinite
    ) -> None:
        self._rank, self._shape, self._record, self._report = rank, shape, record, report
        self._first: tuple[OpKind, int, int] | None = None
        self._lock = threading.Lock()
        on_device = device.type == "cuda"
        self._values = torch.zeros((shape.layers + 2, shape.tokens, 3), device=device) if on_device else None
        self._reader = _DeviceReader(self._values, self._look) if self._values is not None else None

    @property
    def of_layers(self) -> Tensor | None:
        """Where graphs keep the largest values of layers, float32 [layers, tokens, 3]: K, V, hidden state; on CUDA."""
        return None if self._values is None else self._values[: self._shape.layers]

    def made(self, op: Op, hidden: Tensor, block: Tensor | None = None) -> None:
        """The op has made a hidden state, [1, tokens, hidden_size], and a block, [tokens, 2, kv_heads, head_dim]."""
        if self._reader is not None:
            largest_values(hidden, block, self._place(op))
            self._reader.note(op, torch.cuda.current_stream(hidden.device))
        elif not (_has_finite_sum(hidden) and (block is None or _has_finite_sum(block))):
            self._look_at(op, largest_values(hidden, block, torch.zeros((hidden.shape[1], 3))))

    def kept(self, op: Op) -> None:
        """A graph on the default stream has kept the largest values of a layer op in `of_layers`."""
        if self._reader is not None:
            self._reader.note(op)

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
        if self._values is not None:
            self._values.zero_()  # what is done has been looked at

    def settle(self) -> None:
        """Wait until all that has been made so far has been looked at."""
        if self._reader is not None:
            self._reader.settle()

    def close(self) -> None:
        """No op will make anything any more."""
        if self._reader is not None:
            self._reader.close()

    def _place(self, op: Op) -> Tensor:
        """The values of what an op makes, [tokens, 3], on the device."""
        assert self._values is not None
        if op.kind == "norm":
            return self._values[-1, :1]
        rows = self._shape.chunks[op.chunk]
        return self._values[op.layer if op.kind == "layer" else -2, rows.start : rows.stop]

    def _look(self, ops: Sequence[Op]) -> None:
        for op in ops:
            self._look_at(op, self._place(op).cpu())

    def _look_at(self, op: Op, largest: Tensor) -> None:
        """`largest` as from `largest_values`, on the host."""
        if largest.isfinite().all():
            return
        bad = largest.isfinite().logical_not_()
        column = next(number for number in range(3) if bad[:, number].any())
        tensor: Any = ("K", "V", "final" if op.kind == "norm" else "hidden")[column]
        row = int(bad[:, column].int().argmax())
        chunk = self._shape.chunks[op.chunk]
        token = chunk.stop - 1 if op.kind == "norm" else chunk.start + row
        value: Any = "NaN" if largest[row, column].isnan() else "Inf"
        found = NonFinite(self._rank, op.kind, op.chunk, op.layer, tensor, value, token)
        with self._lock:
            self._record(found)
            is_first, place = self._first is None, (op.kind, op.chunk, op.layer)
            self._first = self._first or place
        if is_first:
            log.warning("%s", found)
            self._report(found)


def largest_values(hidden: Tensor, block: Tensor | None, out: Tensor) -> Tensor:
    """The largest absolute value of each token, NaN where one of them is NaN: float32, `out`, [tokens, 3].

    Of K and of V of `block`, [tokens, 2, kv_heads, head_dim], which without one stay as they are, and of `hidden`, [1,
    tokens, hidden_size]. Does not wait for the device.
    """
    _largest(hidden[0], out[:, 2])
    if block is not None:
        _largest(block.flatten(2), out[:, :2])
    return out


def _largest(values: Tensor, out: Tensor) -> None:
    torch.linalg.vector_norm(values, inf, dim=-1, dtype=torch.float32, out=out)


def _has_finite_sum(values: Tensor) -> bool:
    """False where a value is not finite, and where the sum overflows float32."""
    return isfinite(values.sum(dtype=torch.float32))


class _DeviceReader:
    """Looks for values that are not finite on a thread of its own, and calls `look` with the ops that may have made
    them."""

    def __init__(self, values: Tensor, look: Callable[[Sequence[Op]], None]) -> None:
        self._values, self._look, self._closed = values, look, False
        self._stream = torch.cuda.Stream(values.device)  # type: ignore[no-untyped-call]
        self._answer = torch.zeros((), dtype=torch.bool, pin_memory=True)
        self._answered = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        # The memory may have been another tensor's until now, and any stream may use it first.
        torch.cuda.current_stream(values.device).synchronize()
        self._noted: deque[Op] = deque()
        self._streams = {torch.cuda.default_stream(values.device)}
        self._looking = self._hurry = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="dinfer NaN and Inf", daemon=True).start()

    def note(self, op: Op, stream: torch.cuda.Stream | None = None) -> None:
        """An op has been launched on this stream, by default the device's, with what keeps its values."""
        if stream is not None:
            self._streams.add(stream)
        is_first = not self._noted
        self._noted.append(op)
        if is_first:
            with self._changed:
                self._changed.notify_all()

    def settle(self) -> None:
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or not (self._noted or self._looking))
            self._hurry = False

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while (ops := self._next()) is not None:
            try:
                if not self._are_finite():
                    self._look(ops)
            except Exception:  # a device that fails also fails the op; this thread must not block its lanes
                log.exception("what `%s` made could not be looked at", ops[0])
            finally:
                with self._changed:
                    self._looking = False
                    self._changed.notify_all()

    def _next(self) -> list[Op] | None:
        """The ops since the last call; None once it is closed."""
        with self._changed:
            # With a limit: who notes an op does not take the lock to see whether this thread waits.
            while not (self._closed or self._noted):
                self._changed.wait(LONGEST_PAUSE_S)
            self._changed.wait_for(lambda: self._closed or self._hurry, PAUSE_S)
            if not self._noted:
                return None
            self._looking = True
            return [self._noted.popleft() for _ in range(len(self._noted))]

    def _are_finite(self) -> bool:
        for stream in tuple(self._streams):
            self._stream.wait_stream(stream)
        with torch.cuda.stream(self._stream):
            self._answer.copy_(self._values.isfinite().all(), non_blocking=True)
            self._answered.record(self._stream)
        self._answered.synchronize()
        return bool(self._answer)

"""One rank under its user's hand, in a `%%px` cell: step it, see what it holds.

Every rank goes to the same next cut if all make the same call. One that steps alone does what it can and says, past its
deadline, whom it waits for; called again once the others have moved, it goes on from there.
"""

from dataclasses import dataclass, field

from torch import Tensor

from dinfer.engine.conditions import made_by
from dinfer.engine.execution import Execution
from dinfer.engine.handlers import Prefill
from dinfer.engine.probes import statistics
from dinfer.plan.cut import Unit
from dinfer.plan.ops import Op
from dinfer.plan.partition import within


@dataclass(frozen=True)
class Steps:
    """What one call of `engine.step` did on one rank: `lines`, one an op; `waits`: for whom, if it is not through."""

    rank: int
    unit: Unit
    lines: tuple[str, ...]
    waits: str = ""
    edited: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        head = f"rank {self.rank}: {self.waits}" if not self.waits.startswith("rank") else self.waits
        if not self.waits:
            head = f"rank {self.rank}: one {self.unit}, {len(self.lines)} ops"
        edited = [f"  edited by hand: {', '.join(self.edited)}"] if self.edited else []
        return "\n".join([head, *(f"  {line}" for line in self.lines), *edited])


@dataclass(frozen=True)
class LayerKV:
    """K and V of one layer on one rank, views of the cache: writing to them changes the cache.

    `k` and `v` are [kv_heads, tokens, head_dim]; `chunks` are those that are here, in order from chunk 0, and `tokens`
    is how many tokens they hold.
    """

    rank: int
    layer: int
    chunks: tuple[int, ...]
    k: Tensor
    v: Tensor

    @property
    def tokens(self) -> int:
        return self.k.shape[1]

    def __repr__(self) -> str:
        head = f"layer {self.layer} on rank {self.rank}: {self.tokens} tokens, chunks {list(self.chunks)}"
        if not self.tokens:
            return f"{head} (nothing computed or received yet)"
        return f"{head}\n  K {statistics(self.k)}\n  V {statistics(self.v)}"


def ops_between(executor: Execution, before: tuple[int, ...], after: tuple[int, ...]) -> list[Op]:
    """The rank's ops between two positions, lane by lane."""
    lanes = executor.plan.lanes[executor.rank]
    return [op for lane, one, other in zip(lanes, before, after, strict=True) for op in lane.ops[one:other]]


def op_lines(state: Prefill, ops: list[Op]) -> tuple[str, ...]:
    """Each op, with shape and statistics of what it has left here."""
    lines = []
    for op in ops:
        made = "; ".join(f"{name} {statistics(tensor)}" for name, tensor in made_by(state, op))
        lines.append(f"{op}   {made}" if made else str(op))
    return tuple(lines)


def layer_kv(executor: Execution, layer: int) -> LayerKV:
    """What the rank holds of a layer: the chunks that are here without a gap. Raises PlanError for no such layer."""
    state, shape = executor.state, executor.plan.shape
    within("layer", layer, shape.layers)
    chunks = list[int]()
    for chunk in range(len(shape.chunks)):
        if not executor.holds_block(chunk, layer):
            break
        chunks.append(chunk)
    stop = shape.chunks[chunks[-1]].stop if chunks else 0
    rows = state.cache.block(layer, 0, stop)
    return LayerKV(
        executor.rank, layer, tuple(chunks), rows[:, 0].transpose(0, 1), rows[:, 1].transpose(0, 1)
    )

"""How messages name ops, transfers, ranks and durations."""

from collections.abc import Iterable, Sequence
from math import inf

from dinfer.plan.ops import Op
from dinfer.plan.plan import Lane
from dinfer.verdict.signs import KvBytes


def at_text(lanes: Sequence[Lane], positions: Sequence[int] | None) -> str:
    """The last layer that a rank has computed, for example `at c0 l1`."""
    if positions is None:
        return "somewhere unknown"
    done = [
        op
        for lane, position in zip(lanes, positions, strict=True)
        for op in lane.ops[:position]
        if op.kind == "layer"
    ]
    return f"at c{done[-1].chunk} l{done[-1].layer}" if done else "before its first layer"


def value_text(op: Op) -> str:
    """What a transfer carries, for example `hidden c0 before layer 2`."""
    return f"hidden c{op.chunk} before layer {op.layer}" if op.what == "hidden" else str(op.value)


def waits_for_text(op: Op) -> str:
    """What a transfer that has begun waits for, for example `waits for hidden c0 before layer 2 from rank 0`."""
    if op.kind == "recv":
        return f"waits for {value_text(op)} from rank {op.peer}"
    return f"waits for rank {op.peer} to take {value_text(op)}"


def link_text(rank: int, op: Op, sizes: KvBytes) -> str:
    """The size and link of a transfer, for example `K and V, 128 tokens, 65,536 bytes, link 0→1 (kv)`."""
    plural = "" if op.tokens == 1 else "s"
    parts = ["K and V"] * (op.what == "kv") + [f"{op.tokens} token{plural}"]
    parts += [f"{sizes.of(op):,} bytes"] * bool(sizes.of(op))
    source, target = (rank, op.peer) if op.kind == "send" else (op.peer, rank)
    return ", ".join([*parts, f"link {source}→{target} ({op.communicator})"])


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 1`, `ranks 0 and 2`, `ranks 0, 1 and 2`."""
    listed = [str(rank) for rank in sorted(ranks)]
    if len(listed) == 1:
        return f"rank {listed[0]}"
    return f"ranks {', '.join(listed[:-1])} and {listed[-1]}"


def seconds_text(seconds: float) -> str:
    """`0.3 s`, `12 s`, `4 ms`; infinite: `until the record ends`."""
    if seconds == inf:
        return "until the record ends"
    if seconds < 0.1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def times_text(seconds: float, median: float) -> str:
    """How long something has taken, and how many times its median: `6.2 s, 620 × its median`."""
    known = f", {seconds / median:,.0f} × its median" if median > 0 else ""
    return f"{seconds_text(seconds)}{known}"

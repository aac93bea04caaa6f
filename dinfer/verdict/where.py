"""Where ranks stand, and how messages name ops, transfers, ranks and durations. Pure: plan and stands in, text out."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from math import inf
from typing import Protocol

from dinfer.plan.cut import Cut
from dinfer.plan.ops import Op
from dinfer.plan.plan import Lane, Plan
from dinfer.verdict.signs import KvBytes


class RankStand(Protocol):
    """Where one rank stands, by lane: how many ops have ended, whether the next has begun, and how many may run. This
    is what texts and views need of `dinfer.engine.board.Stand`."""

    @property
    def positions(self) -> Sequence[int]: ...
    @property
    def started(self) -> Sequence[bool]: ...
    @property
    def limits(self) -> Sequence[int]: ...


def where_text(plan: Plan, stands: Sequence[RankStand]) -> str:
    """A line for each rank: how much of it is done, and the op at which each unfinished lane stands."""
    return "\n".join(f"rank {n}: {rank_text(plan.lanes[n], stand)}" for n, stand in enumerate(stands))


def rank_text(lanes: Sequence[Lane], stand: RankStand) -> str:
    """One rank's line of that."""
    done, total = sum(stand.positions), sum(len(lane.ops) for lane in lanes)
    if done == total:
        return f"all {total} ops done"
    of_all = f"{done} of {total} ops done; "
    ahead = [(n, lane, at) for n, lane in enumerate(lanes) if (at := stand.positions[n]) < len(lane.ops)]
    if tuple(stand.positions) == tuple(stand.limits) and not any(stand.started):
        # The next op that computes, or else the next op of the first lane that has one.
        next_op = min((lane.ops[at] for _, lane, at in ahead), key=lambda op: op.is_transfer)
        return f"{of_all}stands {at_text(lanes, stand.positions)}, next `{next_op}`"
    texts = []
    for n, lane, at in ahead:
        state = "in" if stand.started[n] else "before" if stand.limits[n] > at else "stopped before"
        texts.append(f"{lane.name} {state} `{lane.ops[at]}`")
    return of_all + "; ".join(texts)


def at_text(lanes: Sequence[Lane], positions: Sequence[int] | None) -> str:
    """The last layer that a rank has computed, for example `at c0 l1`."""
    if positions is None:
        return "somewhere unknown"
    ended = (op for lane, at in zip(lanes, positions, strict=True) for op in lane.ops[:at])
    done = [op for op in ended if op.kind == "layer"]
    return f"at c{done[-1].chunk} l{done[-1].layer}" if done else "before its first layer"


def moved_lines(plan: Plan, before: Cut, after: Cut) -> list[str]:
    """What each rank did between two cuts, or undid, a line each."""
    lines = []
    for rank, lanes in enumerate(plan.lanes):
        moves = list(zip(lanes, before[rank], after[rank], strict=True))
        done = _ops_text([op for lane, a, b in moves for op in lane.ops[a:b]])
        undone = _ops_text([op for lane, a, b in moves for op in lane.ops[b:a]])
        texts = [done, undone and f"undid {undone}"]
        lines.append(f"rank {rank}: {'; '.join(filter(None, texts)) or 'nothing'}")
    return lines


def _ops_text(ops: Sequence[Op]) -> str:
    layers = [f"c{op.chunk} l{op.layer}" for op in ops if op.kind == "layer"]
    ends = ops if len(ops) < 12 else []
    parts = [str(op) for op in ends if op.kind == "embed"]
    parts += [f"computed {_few(layers)}"] * bool(layers)
    parts += [str(op) for op in ends if op.kind == "norm"]
    for verb, kind, arrow in (("sent", "send", "to"), ("received", "recv", "from")):
        transfers = sorted((op for op in ops if op.kind == kind), key=lambda op: op.peer)
        for peer, same in groupby(transfers, key=lambda op: op.peer):
            parts.append(f"{verb} {_few([str(op.value) for op in same])} {arrow} {peer}")
    return ", ".join(parts)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]} ({len(names)})"


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
    parts = ["K and V"] * (op.what == "kv") + [f"{op.tokens} token{'s' * (op.tokens != 1)}"]
    parts += [f"{sizes.of(op):,} bytes"] * bool(sizes.of(op))
    source, target = (rank, op.peer) if op.kind == "send" else (op.peer, rank)
    return ", ".join([*parts, f"link {source}→{target} ({op.communicator})"])


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 1`, `ranks 0 and 2`, `ranks 0, 1 and 2`."""
    *others, last = map(str, sorted(ranks))
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"


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

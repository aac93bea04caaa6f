"""Where ranks stand, and how messages name ops, transfers, ranks and durations. Pure: plan and stands in, text out."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from math import inf
from typing import Protocol

from dinfer.plan.cut import Cut, is_inside, meet
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


def stood_text(lanes: Sequence[Lane], stand: RankStand) -> str:
    """The same for a sentence about one rank: the op that computes or, if none does, the transfers that it is in; else
    the next op."""
    if tuple(stand.positions) == tuple(stand.limits) and not any(stand.started):
        return rank_text(lanes, stand)
    done, total = sum(stand.positions), sum(len(lane.ops) for lane in lanes)
    ahead = [(n, lane.ops[at]) for n, lane in enumerate(lanes) if (at := stand.positions[n]) < len(lane.ops)]
    if not ahead:
        return f"all {total} ops done"
    begun = [(n, op) for n, op in ahead if stand.started[n]]
    told = [one for one in begun if not one[1].is_transfer] or begun[:3]
    if not told:
        n, op = min(ahead, key=lambda one: one[1].is_transfer)
        return f"{done} of {total} ops done; {lanes[n].name} before `{op}`"
    texts = [f"{lanes[n].name} in `{op}`" for n, op in told]
    left_out = len(begun) - len(told) if told[0][1].is_transfer else 0
    texts += [f"and in {left_out} other{'s' * (left_out > 1)}"] * bool(left_out)
    return f"{done} of {total} ops done; {'; '.join(texts)}"


def at_text(lanes: Sequence[Lane], positions: Sequence[int] | None) -> str:
    """The last layer that a rank has computed, for example `at c0 l1`."""
    if positions is None:
        return "somewhere unknown"
    ended = (op for lane, at in zip(lanes, positions, strict=True) for op in lane.ops[:at])
    done = [op for op in ended if op.kind == "layer"]
    return f"at c{done[-1].chunk} l{done[-1].layer}" if done else "before its first layer"


def moved_lines(plan: Plan, before: Cut, after: Cut) -> list[str]:
    """What was done and undone between two cuts: a line for each rank; where ops were only undone, one line for all."""
    if is_inside(after, before) and after != before:
        return [f"undid {ops_text(plan, after, before)}"]
    lines = []
    for rank, lanes in enumerate(plan.lanes):
        moves = list(zip(lanes, before[rank], after[rank], strict=True))
        done = _ops_text([op for lane, a, b in moves for op in lane.ops[a:b]])
        undone = _ops_text([op for lane, a, b in moves for op in lane.ops[b:a]])
        texts = [done, undone and f"undid {undone}"]
        lines.append(f"rank {rank}: {'; '.join(filter(None, texts)) or 'nothing'}")
    return lines


def ops_text(plan: Plan, less: Cut, more: Cut) -> str:
    """The ops that `more` has and `less` has not, in one line: their blocks, for example `c0 l7 on ranks 0–2`, and what
    belongs to none of these blocks."""
    ops = [
        (rank, op)
        for rank, lanes in enumerate(plan.lanes)
        for lane, a, b in zip(lanes, less[rank], more[rank], strict=True)
        for op in lane.ops[a:b]
    ]
    blocks = {(op.chunk, op.layer) for _, op in ops if op.kind == "layer"}
    others = [(rank, op) for rank, op in ops if blocks.isdisjoint(_blocks_of(plan, op))]
    texts = list(dict.fromkeys(_other_text(rank, op) for rank, op in others))
    if blocks:
        ranks = {rank for rank, op in ops if not blocks.isdisjoint(_blocks_of(plan, op))}
        texts.insert(0, f"{_few([f'c{c} l{n}' for c, n in sorted(blocks)])} on {rank_spans_text(ranks)}")
    return ", ".join(texts if len(texts) <= 4 else [*texts[:3], f"and {len(texts) - 3} more"])


def returned_text(plan: Plan, before: Cut, after: Cut, had: int, has: int) -> str:
    """What it took to go from one cut to another, and from `had` new tokens to `has`, in one line."""
    kept, texts = meet(before, after), list[str]()
    if kept != before:
        texts.append(f"took back {ops_text(plan, kept, before)}")
    if kept != after:
        texts.append(f"did {ops_text(plan, kept, after)} again")
    if had != has:
        tokens = f"{abs(had - has)} new token{'s' * (abs(had - has) != 1)}"
        texts.append(f"took back {tokens}" if had > has else f"made {tokens} again")
    return "; ".join(texts) or "it stood there already"


def _blocks_of(plan: Plan, op: Op) -> set[tuple[int, int]]:
    """The blocks, as chunk and layer, to whose computing or sync an op belongs: a hidden state to that of the layer
    that makes it and that of the layer that it enters."""
    if op.what == "final" or op.kind == "norm":
        return {(len(plan.shape.chunks) - 1, plan.shape.layers - 1)}
    if op.kind == "embed":
        return {(op.chunk, 0)}
    if op.kind == "layer" or op.what == "kv":
        return {(op.chunk, op.layer)}
    return {(op.chunk, op.layer - 1), (op.chunk, op.layer)}


def _other_text(rank: int, op: Op) -> str:
    if not op.is_transfer:
        return f"{op} on rank {rank}"
    source, target = (rank, op.peer) if op.kind == "send" else (op.peer, rank)
    return f"{op.value} {source}→{target}"


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
    """`rank 1`, `ranks 0 and 2`, `ranks 0, 1 and 2`; of more than three, as spans."""
    ranks = set(ranks)
    if len(ranks) > 3:
        return rank_spans_text(ranks)
    *others, last = map(str, sorted(ranks))
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"


def rank_spans_text(ranks: Iterable[int]) -> str:
    """`rank 1`, `ranks 0–2`, `ranks 0–1, 3`: for many ranks."""
    spans = list[list[int]]()
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    texts = [f"{span[0]}–{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans]
    return f"rank{'s' * (sum(map(len, spans)) > 1)} {', '.join(texts)}"


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

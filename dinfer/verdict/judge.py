"""Judge: from the graph of who waits for whom to the culprit, and whether a rank or link of a run that moves is slow.

Pure. `planned` makes the graph from a plan, `recorded` from events alone.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple, TypeVar

from dinfer.plan.graph import Graph
from dinfer.plan.plan import Plan
from dinfer.plan.verify import shortest_cycle
from dinfer.verdict.planned import Planned
from dinfer.verdict.signs import KvBytes, Signs
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.waits import CYCLE_S, KINDS, HangKind, Node, Root, Wait, Waits
from dinfer.verdict.where import ranks_text, seconds_text


class _Cause(NamedTuple):
    """A root, its nodes, and every node that waits for these, directly or not, with the next node on the way there."""

    root: Root
    nodes: tuple[Node, ...]
    waiting: dict[Node, Node]

    def ranks(self) -> set[int]:
        return {node.rank for node in self.waiting} | {node.rank for node in self.nodes}


def judge(waits: Waits) -> Verdict:
    """The verdict on the worst cause; among equals, on the one for which most ranks wait."""
    causes = _causes(waits)
    if not causes:
        return Verdict("done", "the run is done", waits=waits)
    first = min(
        causes, key=lambda cause: (KINDS.index(cause.root.kind), -len(cause.ranks()), cause.root.rank)
    )
    root = first.root
    culprits = tuple(sorted({n.rank for n in first.nodes})) if root.kind == "cycle" else (root.rank,)
    blocked = tuple(sorted(first.ranks() - set(culprits)))
    if root.kind in ("moving", "done") or (root.kind == "held" and not blocked):  # nothing is wrong
        kind: HangKind = "paused" if root.kind == "held" else root.kind
        texts = {"moving": "the run moves", "paused": "the run stands where it was told to stop"}
        return Verdict(kind, texts.get(kind, "the run is done"), lines=_lines(waits, ()), waits=waits)
    text = _said(root)
    if blocked:
        whom = "them" if root.kind == "cycle" else "it"
        text += f"; {ranks_text(blocked)} wait{'s' * (len(blocked) == 1)} for {whom}"
    chain = _chain(waits, first)
    return Verdict(root.kind, text, culprits, root.peer, blocked, chain, _lines(waits, chain), waits)


TERMS: dict[HangKind, str] = {
    "cycle": "deadlock",
    "never sent": "missing send",
    "never received": "missing recv",
    "never joined": "missing collective",
    "sent twice": "duplicate send",
    "wrong peer": "wrong peer",
    "out of order": "order mismatch",
    "another plan": "plan mismatch",
    "other size": "size mismatch",
}
"""the field's term for what other texts describe; it stands first in the sentence"""


def _said(root: Root) -> str:
    """What is wrong, as a sentence: of a link or a cycle, the text is one."""
    text = (
        root.text if root.kind in ("cycle", "stalled link", "slow link") else f"rank {root.rank} {root.text}"
    )
    return f"{TERMS[root.kind]}: {text}" if root.kind in TERMS else text


def _causes(waits: Waits) -> list[_Cause]:
    """A cause for the shortest cycle, and one for each root. Nodes with the same root, such as the two ends of a link
    or the lanes of a rank, are one cause."""
    causes = []
    nodes = sorted(waits)
    numbers = {node: number for number, node in enumerate(nodes)}
    edges = {numbers[n]: [numbers[to] for to in waits[n].on if to in numbers] for n in nodes}
    cycle = tuple(nodes[number] for number in shortest_cycle(edges))
    if cycle and min(waits[node].still_s for node in cycle) >= CYCLE_S:
        text = "; ".join(_shortened([f"rank {n.rank} {waits[n].text}" for n in cycle]))
        causes.append(_Cause(Root("cycle", cycle[0].rank, text), cycle, _waiting(waits, cycle)))
    by_root: dict[tuple[HangKind, int, int | None], list[tuple[Wait, Root]]] = {}
    for wait in waits.values():
        if root := wait.root:
            by_root.setdefault((root.kind, root.rank, root.peer), []).append((wait, root))
    for found in by_root.values():
        found.sort(key=lambda one: -one[0].still_s)
        alike = tuple(wait.node for wait, _ in found)
        causes.append(_Cause(found[0][1], alike, _waiting(waits, alike)))
    return causes


MOST_IN_CYCLE = 5


def _shortened(texts: Sequence[str]) -> list[str]:
    """Of a long cycle, its first three and its last."""
    if len(texts) <= MOST_IN_CYCLE:
        return list(texts)
    return [*texts[:3], f"and so on, {len(texts) - 4} ranks", texts[-1]]


def _waiting(waits: Waits, roots: Sequence[Node]) -> dict[Node, Node]:
    """Every node that waits for one of these, directly or not, with the next node on the shortest way there."""
    back: dict[Node, list[Node]] = {}
    for node, wait in waits.items():
        for to in wait.on:
            back.setdefault(to, []).append(node)
    found: dict[Node, Node] = {}
    queue = deque(roots)
    while queue:
        node = queue.popleft()
        for before in back.get(node, ()):
            if before not in found and before not in roots:
                found[before] = node
                queue.append(before)
    return found


def _chain(waits: Waits, cause: _Cause) -> tuple[Wait, ...]:
    """The waits from the rank farthest from the root to the root; for a cycle, the cycle."""
    if cause.root.kind == "cycle":
        return tuple(waits[node] for node in cause.nodes)
    paths = []
    for node in sorted(cause.waiting) or [cause.nodes[0]]:
        path = [node]
        while path[-1] in cause.waiting:
            path.append(cause.waiting[path[-1]])
        paths.append(path)
    longest = max(paths, key=lambda path: (len({node.rank for node in path}), len(path)))
    return tuple(waits[node] for node in longest)


def _lines(waits: Waits, chain: Sequence[Wait]) -> tuple[str, ...]:
    """What each rank does: of its lanes the one on the chain, else the one that matters most."""
    lines = []
    for rank in sorted({node.rank for node in waits}):
        mine = [wait for node, wait in waits.items() if node.rank == rank]
        main = min(mine, key=lambda wait: (wait not in chain, *_urgency(wait)))
        others = sum(bool(wait.on) for wait in mine if wait is not main)
        more = f"; {others} more of its lanes wait{'s' * (others == 1)}" if others else ""
        lines.append(f"rank {rank}: {main}{more}")
    return tuple(lines)


def _urgency(wait: Wait) -> tuple[bool, bool, bool, bool]:
    op, root = wait.op, wait.root
    is_transfer = op is not None and op.is_transfer
    # `where()` names what a rank that stands computes next, or else the first of its lanes.
    if root and root.kind in ("held", "done"):
        return True, is_transfer, False, False
    is_kv, is_recv = op is not None and op.what == "kv", op is None or op.kind == "recv"
    return False, not root and not (is_transfer and wait.on), is_kv, not is_recv


UNKNOWN = KvBytes()


def explain(
    plan: Plan,
    signs: Sequence[Signs],
    sizes: KvBytes = UNKNOWN,
    stacks: Mapping[int, str] | None = None,
    *,
    graph: Graph | None = None,
    ahead_s: float = 0.0,
    tell_slow: bool = True,
) -> Verdict:
    """Why the run does not move, or that it does.

    `signs`: by rank, one for each of the plan's ranks; `stacks`: by rank, texts to add to the verdict. `graph`: the
    plan's, to save making it on every call. `ahead_s`: what will count as stuck in so many seconds, if nothing changes,
    counts as stuck now. `tell_slow`: say of a run that moves which rank or link is slow.
    """
    found = judge(Planned(plan, signs, graph or Graph(plan), sizes, ahead_s).waits())
    if tell_slow and found.kind == "moving" and (root := _slow(plan, signs)):
        found = replace(found, kind=root.kind, sentence=_said(root), ranks=(root.rank,), peer=root.peer)
    return replace(found, stacks=dict(stacks or {}))


SLOW_RANK, SLOW_LINK = 1.6, 4.0
"""a rank is slow if its layers take so many times as long as the others', a link if its blocks do"""

LEAST_LINK_S = 10e-3
"""a link on which a block takes less is not slow"""

GroupT = TypeVar("GroupT")


def _slow(plan: Plan, signs: Sequence[Signs]) -> Root | None:
    """The slowest rank or link, if one stands out."""
    layers = {rank: its.medians["layer"] for rank, its in enumerate(signs) if its.medians.get("layer")}
    if found := _outlier(layers, SLOW_RANK):
        rank, times, usual = found
        why = f"a layer takes it {seconds_text(layers[rank])} where others take {seconds_text(usual)}"
        return Root("slow rank", rank, f"is slow, {times:.1f} ×: {why}; {_behind(plan, signs, rank)}")
    links = {(source, rank): s for rank, its in enumerate(signs) for source, s in its.links.items()}
    found_link = _outlier(links, SLOW_LINK)
    if found_link and links[found_link[0]] > LEAST_LINK_S:
        (source, target), times, usual = found_link
        took = f"a block takes {seconds_text(links[source, target])} where others take {seconds_text(usual)}"
        back = links.get((target, source), 0.0)
        if back >= SLOW_LINK * usual:  # each transfer needs an answer in the other direction
            took += f", and {seconds_text(back)} the other way"
        return Root("slow link", source, f"the link {source}→{target} is slow, {times:.1f} ×: {took}", target)
    return None


def _outlier(values: Mapping[GroupT, float], times: float) -> tuple[GroupT, float, float] | None:
    """The key of the largest value, the ratio to the median of the others, and that median; None below `times`."""
    if len(values) < 2:
        return None
    largest = max(values, key=lambda key: values[key])
    usual = median(value for key, value in values.items() if key != largest)
    return (largest, values[largest] / usual, usual) if values[largest] >= times * usual > 0 else None


def _behind(plan: Plan, signs: Sequence[Signs], rank: int) -> str:
    """How many of its layer ops the rank has done, and how many the rank that is furthest."""
    shares = []
    for lanes, its in zip(plan.lanes, signs, strict=True):
        positions = its.positions or (0,) * len(lanes)
        ended = (op for lane, at in zip(lanes, positions, strict=True) for op in lane.ops[:at])
        total = sum(op.kind == "layer" for lane in lanes for op in lane.ops) or 1
        shares.append((sum(op.kind == "layer" for op in ended), total))
    done, total = shares[rank]
    ahead = [
        n
        for n, (its_done, its_total) in enumerate(shares)
        if n != rank and its_done * total > done * its_total
    ]
    text = f"it has done {done} of {total} layer ops"
    if not ahead:
        return f"{text}, as many as the others"
    most = max(ahead, key=lambda n: shares[n][0] / shares[n][1])
    return f"{text}, rank {most} {shares[most][0]} of {shares[most][1]}"

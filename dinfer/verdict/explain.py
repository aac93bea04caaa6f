"""Explain: plan and signs of life in, verdict out: the entry for runs whose plan is known."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dinfer.plan.graph import Graph
from dinfer.plan.plan import Plan
from dinfer.verdict.judge import ABOUT_LINKS, judge
from dinfer.verdict.planned import Planned
from dinfer.verdict.ranks import Ranks
from dinfer.verdict.signs import Signs, Sizes
from dinfer.verdict.slow import slow
from dinfer.verdict.verdict import Verdict

UNKNOWN = Sizes()


def explain(
    plan: Plan,
    signs: Sequence[Signs],
    sizes: Sizes = UNKNOWN,
    stacks: Mapping[int, str] | None = None,
    *,
    graph: Graph | None = None,
    ahead_s: float = 0.0,
    tell_slow: bool = True,
) -> Verdict:
    """Why the run does not move, or that it does. `signs` are by rank, as many as the plan has; `stacks`, texts to go
    with it, are by rank. `graph`: the plan's, for who asks often; `ahead_s`: what will be stuck in so many seconds, if
    nothing changes, counts as stuck; `tell_slow`: whether to say of a run that moves who is slow."""
    found = judge(Planned(Ranks(plan, signs, graph or Graph(plan), ahead_s), sizes).waits())
    if tell_slow and found.kind == "moving" and (root := slow(plan, signs)):
        told = root.text if root.kind in ABOUT_LINKS else f"rank {root.rank} {root.text}"
        found = replace(found, kind=root.kind, sentence=told, ranks=(root.rank,), peer=root.peer)
    return replace(found, stacks=dict(stacks or {}))

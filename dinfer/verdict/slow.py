"""Whether a rank, or a link, of a run that moves is slow, how far behind, and why. Pure."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TypeVar

from dinfer.plan.plan import Plan
from dinfer.verdict.signs import Signs
from dinfer.verdict.waits import Root
from dinfer.verdict.words import ranks_text, seconds_text

SLOW_RANK = 1.6
"""times what the other ranks take for a layer"""

SLOW_LINK = 4.0

LEAST_LINK_S = 10e-3
"""what takes less holds nobody up"""

GroupT = TypeVar("GroupT")


def slow(plan: Plan, signs: Sequence[Signs]) -> Root | None:
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
        if back >= SLOW_LINK * usual:  # each message is asked for in the other direction
            took += f", and {seconds_text(back)} the other way"
        return Root("slow link", source, f"the link {source}→{target} is slow, {times:.1f} ×: {took}", target)
    return None


def _outlier(values: Mapping[GroupT, float], times: float) -> tuple[GroupT, float, float] | None:
    """The largest, how many times the median of the others it is, and that; None if it is not so many times."""
    if len(values) < 2:
        return None
    largest = max(values, key=lambda key: values[key])
    usual = median(value for key, value in values.items() if key != largest)
    return (largest, values[largest] / usual, usual) if values[largest] >= times * usual > 0 else None


def _behind(plan: Plan, signs: Sequence[Signs], rank: int) -> str:
    """How many of its layer ops a rank has done, and the others of theirs."""
    shares = [_layers(plan, number, its) for number, its in enumerate(signs)]
    done, total = shares[rank]
    ahead = [n for n, (its, of) in enumerate(shares) if n != rank and its * total > done * of]
    told = f"it has done {done} of {total} layer ops"
    if not ahead:
        return f"{told}, as many as others"
    most = max(ahead, key=lambda n: shares[n][0] / shares[n][1])
    return f"{told}, {ranks_text([most])} {shares[most][0]} of {shares[most][1]}"


def _layers(plan: Plan, rank: int, signs: Signs) -> tuple[int, int]:
    lanes = plan.lanes[rank]
    positions = signs.positions or (0,) * len(lanes)
    kinds = [
        (op.kind == "layer", index < at)
        for lane, at in zip(lanes, positions, strict=True)
        for index, op in enumerate(lane.ops)
    ]
    return sum(is_layer and done for is_layer, done in kinds), sum(is_layer for is_layer, _ in kinds) or 1

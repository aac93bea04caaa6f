"""Slowness: faults that change no byte, but make a link or a rank slow; checked against the plan."""

from collections.abc import Iterable
from math import isfinite
from typing import Any

from dinfer.plan.faults import SLOW, Fault
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import within
from dinfer.plan.plan import Plan

MOST_MS = 10_000
"""more would be taken for a hang"""

MOST_TIMES = 100


def slow_fault(number: int, kind: str, plan: Plan, **given: Any) -> Fault:
    """A fault of a kind of SLOW from the arguments of `run.inject`; those that are None are not given. Raises PlanError
    for those that it does not take, and for a link that this plan does not use."""
    given = {name: value for name, value in given.items() if value is not None}
    takes = SLOW[kind]
    for wrong in (name for name in given if name not in takes):
        raise PlanError(
            f"{kind} takes no {wrong}: it breaks no block. It takes {', '.join(takes)}; leave {wrong} out."
        )
    rank = _rank(kind, "target" if kind == "slow link" else "rank", given, plan)
    if kind == "slow link":
        source = _rank(kind, "source", given, plan)
        if rank not in (targets := _targets(plan, source)):
            to = f"to rank{'s' * (len(targets) > 1)} {_listed(targets)}" if targets else "to no rank"
            raise PlanError(f"rank {source} sends nothing to rank {rank} in this plan; it sends {to}.")
        return Fault(number, kind, "wire", rank, source=source, ms=_amount(kind, "ms", given, 0, MOST_MS))
    if ("ms" in given) == ("factor" in given):
        both = ", not both" * ("ms" in given)
        raise PlanError(
            "slow rank needs ms=…, by how much longer each layer takes, or factor=…, how many times as "
            f"long{both}."
        )
    if "ms" in given:
        return Fault(number, kind, "compute", rank, ms=_amount(kind, "ms", given, 0, MOST_MS))
    return Fault(number, kind, "compute", rank, factor=_amount(kind, "factor", given, 1, MOST_TIMES))


def _rank(kind: str, name: str, given: dict[str, Any], plan: Plan) -> int:
    if name not in given:
        raise PlanError(f"{kind} needs a {name}: give {name}=0 to {plan.world_size - 1}.")
    within(name, given[name], plan.world_size)
    return int(given[name])


def _targets(plan: Plan, source: int) -> list[int]:
    """The ranks to which a rank sends anything."""
    ops = (op for lane in plan.lanes[source] for op in lane.ops)
    return sorted({op.peer for op in ops if op.kind == "send" and op.peer is not None})


def _amount(kind: str, name: str, given: dict[str, Any], least: float, most: float) -> float:
    """A number of that name, more than `least`."""
    value = given.get(name)
    if value is None:
        raise PlanError(f"{kind} needs {name}: give a number, more than {least:g}.")
    if not (isfinite(value) and least < value <= most):
        raise PlanError(f"{name} is {value:g}; it must be more than {least:g}, and {most:g} at most.")
    return float(value)


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))

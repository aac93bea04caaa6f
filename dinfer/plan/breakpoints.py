"""Breakpoints: the ops after which a run stops, and the cut at which it then stands.

A breakpoint without a condition is a place in the plan, so the stop is known in advance. A condition (`when`) is parsed
here and evaluated on the rank, on what the op has made.
"""

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from dinfer.display import Tidy
from dinfer.plan.cut import Cut, Cuts, is_inside, join
from dinfer.plan.ops import Op, OpKind, PlanError
from dinfer.plan.partition import within

Condition = Literal["", "nan", "inf", "absmax", "digest", "slower"]
OpOfRank = tuple[int, Op]
"""an op, after its rank"""

CONDITION_FORMS = "'nan', 'inf', 'absmax > 100', 'digest differs', 'slower than 5 ms'"
_ABSMAX = re.compile(r"absmax\s*(?:>|above)\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", re.IGNORECASE)
_SLOWER = re.compile(r"slower\s+than\s+(\d+\.?\d*|\.\d+)\s*ms", re.IGNORECASE)


@dataclass(frozen=True, repr=False)
class Breakpoint(Tidy):
    """Stops after ops of this `rank`, kind (`op`), `chunk` and `layer`; None matches any. `number`: in the list of a
    run.

    One that is not `enabled` stops nothing. `condition`: the kind of what `when` says; `bound`: for absmax the largest
    absolute value that does not stop the run, for slower the milliseconds. `hit`: where given, the only one of its hits
    that stops the run, from 1: of all matching ops in the order in which steps by op run them; with a condition, of
    those of one rank at which it has held. So a run that goes back and on stops at the same op again.
    """

    number: int
    rank: int | None = None
    op: OpKind = "layer"
    chunk: int | None = None
    layer: int | None = None
    condition: Condition = ""
    bound: float = 0.0
    enabled: bool = True
    hit: int | None = None

    def matches(self, rank: int, op: Op) -> bool:
        """Whether it stops after this op of this rank, if its condition holds."""
        return (
            self.enabled
            and self.op == op.kind
            and self.rank in (None, rank)
            and self.chunk in (None, op.chunk)
            and self.layer in (None, op.layer)
        )

    @property
    def when(self) -> str:
        """The condition as text that `parse_when` reads; empty without a condition."""
        texts = {
            "absmax": f"absmax > {self.bound:g}",
            "slower": f"slower than {self.bound:g} ms",
            "digest": "digest differs",
        }
        return texts.get(self.condition, self.condition)

    @property
    def call(self) -> str:
        """The call that sets it, for example `run.break_at(chunk=2, layer=7)`."""
        op, when = (None if self.op == "layer" else self.op), self.when or None
        given = {"rank": self.rank, "op": op, "chunk": self.chunk, "layer": self.layer, "when": when}
        given["hit"] = self.hit
        listed = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        return f"run.break_at({', '.join(listed)})"

    def as_dict(self) -> dict[str, Any]:
        """Its fields, as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """For example `#1: after layer 7, chunk 2, on rank 1, when absmax > 100`."""
        where = [f"{self.op} {self.layer}" if self.layer is not None else f"each {self.op}"]
        where += [f"chunk {self.chunk}"] * (self.chunk is not None)
        where += [f"on rank {self.rank}"] * (self.rank is not None)
        where += [f"when {self.when}"] * bool(self.condition)
        where += [f"only at hit {self.hit}"] * (self.hit is not None)
        return f"#{self.number}: after {', '.join(where)}" + " (disabled)" * (not self.enabled)

    __repr__ = __str__


def parse_when(text: str | None) -> tuple[Condition, float]:
    """Parse a condition such as `absmax > 100`: its kind and bound. Raises PlanError for any other text."""
    if not text:
        return "", 0.0
    plain = " ".join(text.split())
    by_text: dict[str, Condition] = {"nan": "nan", "inf": "inf", "digest differs": "digest"}
    if condition := by_text.get(plain.lower()):
        return condition, 0.0
    if match := _ABSMAX.fullmatch(plain):
        return "absmax", float(match[1])
    if match := _SLOWER.fullmatch(plain):
        return "slower", float(match[1])
    raise PlanError(f"when is {text!r}; it must be one of {CONDITION_FORMS}.")


def check(breakpoint: Breakpoint, cuts: Cuts) -> None:
    """Raises PlanError if no op of the plan matches; the message has the valid values."""
    if breakpoint.op not in get_args(OpKind):
        raise PlanError(f"op is {breakpoint.op!r}; it must be one of {', '.join(get_args(OpKind))}.")
    count = len(cuts.ops_where(breakpoint.matches))
    if count >= (breakpoint.hit or 1):
        return
    if count:
        raise PlanError(
            f"hit is {breakpoint.hit}; {count} ops of this run match, so it is hit {count} times at most."
        )
    shape = cuts.plan.shape
    for name, count in (("chunk", len(shape.chunks)), ("layer", shape.layers), ("rank", shape.world_size)):
        if (value := getattr(breakpoint, name)) is not None:
            within(name, value, count)
    raise PlanError(
        f"no op of this run matches {str(breakpoint).split(': after ')[1]}: layer ops run on the rank that owns the "
        f"layer (stages start at {', '.join(map(str, shape.starts))})."
    )


def next_stop(cuts: Cuts, cut: Cut, breakpoints: list[Breakpoint]) -> tuple[Cut, list[Breakpoint]]:
    """The cut at which a run from `cut` stops next, and the breakpoints met there; at the end, none.

    After a layer op the run stops as `run_to` does: every rank holds that block and all blocks before it.
    """
    places = [one for one in breakpoints if not one.condition]
    if not places:
        return cuts.end, []
    stops = {one.number: _stops(cuts, one) for one in places}
    found = cuts.after_next(cut, lambda rank, op: any(stop(rank, op) for stop in stops.values()))
    if found is None:
        return cuts.end, []
    stop, rank, op = found
    if op.kind == "layer":
        stop = join(cut, cuts.after_block(op.chunk, op.layer))
    return stop, [one for one in places if stops[one.number](rank, op)]


def _stops(cuts: Cuts, one: Breakpoint) -> Callable[[int, Op], bool]:
    """Whether a breakpoint without a condition stops a run after this op of this rank."""
    if one.hit is None or not one.enabled:
        return one.matches
    matching = cuts.ops_where(one.matches)
    return lambda rank, op: (rank, op) == matching[one.hit - 1]  # type: ignore[operator]


def previous_stop(
    cuts: Cuts, cut: Cut, breakpoints: list[Breakpoint], met: Mapping[int, Set[OpOfRank]]
) -> tuple[Cut, list[Breakpoint]]:
    """The last cut before `cut` at which a breakpoint stops a run, and the breakpoints there; at the start, none.

    `met`: for breakpoints with a condition, by number, the ops at which it is known to have been met.
    """

    stops = {one.number: _stops(cuts, one) for one in breakpoints if not one.condition}

    def has_stopped(one: Breakpoint, rank: int, op: Op) -> bool:
        if not one.condition:
            return stops[one.number](rank, op)
        return one.matches(rank, op) and (rank, op) in met.get(one.number, ())

    for rank, op in cuts.ops_back(cut):
        there = [one for one in breakpoints if has_stopped(one, rank, op)]
        if not there:
            continue
        after = cuts.after_block(op.chunk, op.layer) if op.kind == "layer" else None
        if after is None or not is_inside(
            after, cut
        ):  # a condition may stop a run before all ranks have the block
            after = _just_after(cuts, rank, op)
        if after != cut:
            return after, there
    return cuts.start, []


def _just_after(cuts: Cuts, rank: int, op: Op) -> Cut:
    """The smallest consistent cut with this op."""
    found = cuts.after_next(cuts.start, lambda its_rank, its_op: (its_rank, its_op) == (rank, op))
    assert found is not None
    return found[0]

"""The positions through which a replay steps one rank: those that the steps of the whole run gave it, as far as it was
recorded. Pure."""

from bisect import bisect_left, bisect_right
from functools import cached_property

from dinfer.plan.cut import Cuts, Unit
from dinfer.plan.ops import PlanError, Value
from dinfer.plan.plan import Plan

LanePositions = tuple[int, ...]
"""how many ops of each lane of one rank have ended"""


def is_inside(one: LanePositions, other: LanePositions) -> bool:
    """Whether no lane of `one` is further than in `other`."""
    return all(a <= b for a, b in zip(one, other, strict=True))


def lower(one: LanePositions, other: LanePositions) -> LanePositions:
    return tuple(map(min, one, other))


def upper(one: LanePositions, other: LanePositions) -> LanePositions:
    return tuple(map(max, one, other))


class ReplayPath:
    """The steps of one rank, from its start to `reach`."""

    def __init__(self, plan: Plan, rank: int, reach: LanePositions) -> None:
        self.plan, self.rank, self.reach = plan, rank, reach
        self.start: LanePositions = tuple(0 for _ in reach)
        self._chains: dict[Unit, list[LanePositions]] = {}

    def next(self, at: LanePositions, unit: Unit) -> LanePositions:
        """The positions one step on; `at` itself at the end."""
        chain = self.chain(unit)
        ahead = bisect_left(chain, True, key=lambda link: not is_inside(link, at))
        return upper(at, chain[ahead]) if ahead < len(chain) else at

    def previous(self, at: LanePositions, unit: Unit) -> LanePositions:
        """The positions one step back; `at` itself at the start."""
        chain = self.chain(unit)
        behind = bisect_right(chain, False, key=lambda link: not is_inside(link, at) or link == at)
        return chain[behind - 1] if behind else at

    def after_block(self, chunk: int, layer: int) -> LanePositions:
        """The positions once that block is on every rank, or where the record ends. Raises PlanError for an unknown
        block."""
        return lower(self._cuts.after_block(chunk, layer)[self.rank], self.reach)

    def chain(self, unit: Unit) -> list[LanePositions]:
        """All positions of that unit's steps, from start to reach."""
        if unit not in self._chains:
            links = self._single() if unit == "op" else [cut[self.rank] for cut in self._cuts.chain(unit)]
            clipped = [lower(link, self.reach) for link in links]
            self._chains[unit] = list(dict.fromkeys([self.start, *clipped, self.reach]))
        return self._chains[unit]

    @cached_property
    def _cuts(self) -> Cuts:
        try:
            return Cuts(self.plan)
        except PlanError:
            raise PlanError(
                "this plan was refuted, so it has no cuts to stop at: step by op, or resume()."
            ) from None

    def _single(self) -> list[LanePositions]:
        """One op after another, in an order in which this rank could run them: what other lanes need comes first."""
        lanes, at, made = self.plan.lanes[self.rank], list(self.start), set[Value]()
        links = [self.start]
        while tuple(at) != self.reach:
            ready = [
                (lane.ops[at[n]].chunk, lane.ops[at[n]].layer, n)
                for n, lane in enumerate(lanes)
                if at[n] < self.reach[n] and made.issuperset(lane.ops[at[n]].needs())
            ]
            if not ready:
                raise PlanError(
                    f"rank {self.rank} cannot have come to {self.reach}: the record is not of this plan."
                )
            lane = min(ready)[2]
            made.update(lanes[lane].ops[at[lane]].makes())
            at[lane] += 1
            links.append(tuple(at))
        return links

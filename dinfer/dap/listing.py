"""A rank's part of the plan as text, which an editor shows as the source of that rank: one op a line."""

from functools import cached_property

from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan

SUFFIX = ".dinferplan"
"""of the name of such a source; the VS Code extension gives it a language, in which breakpoints can be set"""


class RankListing:
    """Lines count from 1."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.rank = rank
        self._lanes = plan.lanes[rank]
        stage = plan.shape.stages[rank]
        self._head = (
            f"# rank {rank} of {plan.world_size}: layers {stage.start} to {stage.stop - 1}; {plan.schedule}, "
            f"{plan.sync_strategy}; each lane runs its ops one after another"
        )

    @property
    def name(self) -> str:
        return f"rank {self.rank}{SUFFIX}"

    @cached_property
    def first_lines(self) -> tuple[int, ...]:
        """By lane, the line of its first op."""
        found, line = [], 2
        for lane in self._lanes:
            found.append(line + 1)
            line += 1 + len(lane.ops)
        return tuple(found)

    @cached_property
    def text(self) -> str:
        lines = [self._head]
        for lane in self._lanes:
            lines += [f"lane {lane.name}", *(f"  {op}" for op in lane.ops)]
        return "\n".join(lines) + "\n"

    def line_of(self, lane: int, index: int) -> int:
        """The line of an op; that of the lane's last one where the lane is at its end."""
        return self.first_lines[lane] + max(0, min(index, len(self._lanes[lane].ops) - 1))

    def op_at(self, line: int) -> tuple[int, Op] | None:
        """The number of the lane and the op of a line; None for a line without an op."""
        for number, (first, lane) in enumerate(zip(self.first_lines, self._lanes, strict=True)):
            if first <= line < first + len(lane.ops):
                return number, lane.ops[line - first]
        return None

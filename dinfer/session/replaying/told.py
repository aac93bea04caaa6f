"""What a replay says of itself: what a step did, where the record ends, and where it is not the run."""

from dataclasses import dataclass

from dinfer.plan.ops import Op
from dinfer.session.replaying.recorded import Recorded
from dinfer.session.said import Said

SHOWN = 12
"""ops that are told one by one"""


@dataclass(frozen=True, repr=False)
class Went(Said):
    """What one call did: positions before and after, by lane, and that in words."""

    rank: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    lines: tuple[str, ...]
    remark: str = ""
    edited: tuple[str, ...] = ()

    @property
    def moved(self) -> bool:
        return self.before != self.after

    def __str__(self) -> str:
        lines = list(self.lines) if self.moved else []
        lines += [self.remark] * bool(self.remark)
        lines += [f"edited by hand: {', '.join(self.edited)}"] * bool(self.edited)
        return "\n".join(lines)


def ended_text(recorded: Recorded) -> str:
    """Where the rank stood, and why nothing more can be replayed."""
    lanes = zip(recorded.plan.lanes[recorded.rank], recorded.positions, recorded.begun, strict=True)
    ahead = [(lane.ops[at], begun) for lane, at, begun in lanes if at < len(lane.ops)]
    if not ahead:
        return "the record ends here: the rank had ended prefill"
    stood = [f"in `{op}`" for op, begun in ahead if begun] or [f"before `{ahead[0][0]}`"]
    failed = f"; the run failed: {recorded.failure.partition(chr(10))[0]}" if recorded.failure else ""
    return f"the record ends here: rank {recorded.rank} stood {' and '.join(stood)}{failed}"


def differs_text(op: Op) -> str:
    """Of a block whose bytes are not those that the rank's ledger told of in the run."""
    block = f"block c{op.chunk} l{op.layer}"
    if op.kind == "layer":
        return (
            f"{block} comes out here with other bytes than in the run (another machine, version of torch, device or "
            "number of threads, other weights, or a fault that was armed there)"
        )
    return f"{block} as it was recorded is not what had come from rank {op.peer}: it has changed since"

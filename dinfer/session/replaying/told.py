"""What a replay says of itself: what a step did, where the record ends, and where it is not the run."""

from dataclasses import dataclass

from dinfer.plan.ops import Op
from dinfer.session.replaying.recorded import Recorded
from dinfer.session.said import Said, moved_text

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
        return moved_text(self.lines if self.moved else (), self.remark, self.edited)


def ended_text(recorded: Recorded) -> str:
    """Where the rank stood, and why nothing more can be replayed."""
    lanes = zip(recorded.plan.lanes[recorded.rank], recorded.positions, recorded.begun, strict=True)
    ahead = [(lane.ops[at], begun) for lane, at, begun in lanes if at < len(lane.ops)]
    if not ahead:
        return "the record ends here: the rank had ended prefill"
    stood = [f"in `{op}`" for op, begun in ahead if begun] or [f"before `{ahead[0][0]}`"]
    failed = f"; the run failed: {recorded.failure.partition(chr(10))[0]}" if recorded.failure else ""
    return f"the record ends here: rank {recorded.rank} stood {' and '.join(stood)}{failed}"


def late_edits(recorded: Recorded) -> list[str]:
    """Of hidden states that entered the rank and were edited once its layer had computed with them: what they had been
    is nowhere, so what was made of them before comes out otherwise."""
    found = []
    for edit in recorded.edits:
        lanes = zip(recorded.plan.lanes[recorded.rank], edit.positions, strict=True)
        used = {(op.chunk, op.layer) for lane, at in lanes for op in lane.ops[:at] if op.kind == "layer"}
        found += [
            f"hidden c{chunk} l{layer} was edited by hand after `layer c{chunk} l{layer}` had computed with it, and "
            "what it was before is not recorded"
            for chunk, layer in edit.hidden
            if (chunk, layer) in recorded.hidden and (chunk, layer) in used
        ]
    return found


def left_out(recorded: Recorded) -> list[str]:
    """Of faults that cannot be repeated."""
    return [f"in the run, and not here: fault {one}" for one in recorded.faults if one.kind == "append_twice"]


def differs_text(op: Op) -> str:
    """Of a block whose bytes are not those that the rank's ledger told of in the run."""
    block = f"block c{op.chunk} l{op.layer}"
    if op.kind == "layer":
        return (
            f"{block} comes out here with other bytes than in the run (another machine, version of torch, device or "
            "number of threads, other weights, or a fault that was armed there)"
        )
    return f"{block} as it was recorded is not what had come from rank {op.peer}: it has changed since"

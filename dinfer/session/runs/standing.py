"""Standing: a run at one moment, for those who draw it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from dinfer.engine.board import DeviceMemory, Stand
from dinfer.plan.plan import Plan
from dinfer.session.runs.marks import Mark

State = Literal["starting", "running", "paused", "done", "decoding", "failed", "closed"]
MOVING: tuple[State, ...] = ("starting", "running", "decoding")


class Standing(NamedTuple):
    """`stands` are by rank, empty until all have said where they stand; `message`: why the run stopped or failed."""

    stands: tuple[Stand, ...]
    state: State
    message: str
    decoded: int
    text: str
    devices: tuple[str, ...]
    alive: tuple[bool, ...]
    last_call: str
    faults: tuple[str, ...] = ()
    """a line for each that is armed"""
    marks: tuple[Mark, ...] = ()
    """what is known of single blocks"""
    memory: tuple[int | None, ...] = ()
    """bytes that each rank's process has in its host's memory; None where it has none of its own"""
    tokens: tuple[int, ...] = ()
    """how many new tokens each rank has"""
    verdict: str = ""
    """why the run does not move, at length, once that was told"""
    device_memory: tuple[DeviceMemory | None, ...] = ()
    """what each rank's process has of its GPU; None where it has none of its own"""
    over: str = ""
    """why nothing moves this run any more, and what to do, once that is so"""


def state_of_lanes(plan: Plan, stands: Sequence[Stand]) -> State:
    """What the lanes' positions and limits say; `stands` are those of all ranks, or fewer at the start."""
    if len(stands) < plan.world_size:
        return "starting"
    if not all(stand.at_limits and not any(stand.started) for stand in stands):
        return "running"
    ended = all(
        stand.positions == tuple(len(lane.ops) for lane in lanes)
        for stand, lanes in zip(stands, plan.lanes, strict=True)
    )
    return "done" if ended else "paused"

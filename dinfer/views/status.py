"""Status: all that the panel shows beside the map, as JSON. Pure: a run's plan and standing in, dicts out."""

from collections.abc import Sequence
from typing import Any

from dinfer.plan.plan import Lane, Plan
from dinfer.session.runs.where import Stand, rank_text
from dinfer.views.cells import STATES
from dinfer.views.protocol import Standing

Json = dict[str, Any]
MAX_TEXT = 2000
"""how much of the generated text goes to the browser with each update"""


def layout(plan: Plan, labels: Sequence[str]) -> Json:
    """What does not change during a run."""
    shape = plan.shape
    return {
        "layers": shape.layers,
        "ranks": plan.world_size,
        "owners": list(shape.owners),
        "chunks": [[chunk.start, chunk.stop] for chunk in shape.chunks],
        "labels": list(labels),
        "states": list(STATES),
    }


def status(plan: Plan, standing: Standing) -> Json:
    """What changes."""
    ranks = zip(plan.lanes, standing.stands, standing.devices, standing.alive, strict=True)
    return {
        "state": standing.state,
        "message": standing.message,
        "call": standing.last_call,
        "decoded": standing.decoded,
        "text": standing.text[-MAX_TEXT:],
        "faults": list(standing.faults),
        "ranks": [_rank(*rank) for rank in ranks],
    }


def _rank(lanes: Sequence[Lane], stand: Stand, device: str, alive: bool) -> Json:
    return {
        "device": device,
        "state": rank_state(lanes, stand) if alive else "lost",
        "done": sum(stand.positions),
        "total": sum(len(lane.ops) for lane in lanes),
        "where": rank_text(lanes, stand),
    }


def rank_state(lanes: Sequence[Lane], stand: Stand) -> str:
    """One word for what a living rank does; `waiting` is for data, so a transfer under way counts as that."""
    if all(position == len(lane.ops) for lane, position in zip(lanes, stand.positions, strict=True)):
        return "done"
    begun = [lane.ops[stand.positions[n]] for n, lane in enumerate(lanes) if stand.started[n]]
    if any(not op.is_transfer for op in begun):
        return "computing"
    standing = not begun and list(stand.positions) == list(stand.limits)
    return "stands" if standing else "waiting"

"""Status: all that the panel shows beside the map, as JSON. Pure: a run's plan and standing in, dicts out."""

from collections.abc import Iterable, Sequence
from typing import Any

from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.plan import Lane, Plan
from dinfer.run.state import Mark
from dinfer.verdict.where import RankStand, rank_text
from dinfer.views.cells import MARKS, STATES, CellMap, cut_line, marked
from dinfer.views.protocol import RunView

Json = dict[str, Any]

MemoryTriple = tuple[int, int, int]
"""bytes of a GPU: in tensors, kept by torch, all"""

MAX_TEXT = 2000
"""how much of the generated text goes to the browser with each update"""


MAX_MARKS = 300


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
        "marks": list(MARKS),
    }


def status(plan: Plan, standing: RunView) -> Json:
    """What changes."""
    count = plan.world_size
    memory = [*standing.memory, *[None] * count][:count]
    on_device = [*standing.device_memory, *[None] * count][:count]
    tokens = [*standing.tokens, *[0] * count][:count]
    devices = zip(standing.devices, memory, on_device, strict=True)
    ranks = zip(plan.lanes, standing.stands, standing.alive, tokens, devices, strict=True)
    return {
        "state": standing.state,
        "message": "" if standing.message == standing.over else standing.message,
        "call": standing.last_call,
        "decoded": standing.decoded,
        "text": standing.text[-MAX_TEXT:],
        "faults": list(standing.faults),
        "verdict": standing.verdict,
        "over": standing.over and f"this run is over: {standing.over}",
        "ranks": [_rank(*rank, over=bool(standing.over)) for rank in ranks],
    }


def moment(plan: Plan, cells: CellMap, standing: RunView) -> tuple[Json, bytes, Json]:
    """All that a panel shows of a run at one moment: what changes, the map's bytes, what is known of blocks."""
    states = cells.states(standing.stands)
    shown = {**status(plan, standing), "cut": cut_line(states)}
    return shown, marked(states, standing.marks).tobytes(), marks_text(standing.marks)


def breakpoints(found: Iterable[Breakpoint]) -> list[Json]:
    """For the list, and for the map; `plain`: the panel's form can say all that there is to it."""
    return [
        {
            "number": one.number,
            "text": str(one),
            "layer": one.layer,
            "chunk": one.chunk,
            "rank": one.rank,
            "when": one.when,
            "plain": one.op == ("recv" if one.condition == "digest" else "layer"),
        }
        for one in found
    ]


def marks_text(marks: Sequence[Mark]) -> Json:
    """By block, what is known of it, of at most so many."""
    found: dict[str, list[str]] = {}
    for mark in marks[:MAX_MARKS]:
        found.setdefault(f"{mark.layer} {mark.chunk}", []).append(mark.text)
    return found


def _rank(
    lanes: Sequence[Lane],
    stand: RankStand,
    alive: bool,
    tokens: int,
    device: tuple[str, int | None, MemoryTriple | None],
    *,
    over: bool,
) -> Json:
    name, memory, on_device = device
    return {
        "device": name,
        "memory": memory_text(memory, on_device),
        "about_memory": about_memory(on_device),
        "tokens": tokens,
        "state": "lost" if not alive else "over" if over else rank_state(lanes, stand),
        "done": sum(stand.positions),
        "total": sum(len(lane.ops) for lane in lanes),
        "where": rank_text(lanes, stand),
    }


def memory_text(memory: int | None, on_device: MemoryTriple | None) -> str:
    """What a rank has of its host's memory, and of its GPU's."""
    host = "" if memory is None else f"{_gib(memory)} GiB"
    if on_device is None:
        return host
    gpu = f"{_gib(on_device[0])} of {on_device[2] / (1 << 30):.0f} GiB"
    return f"{gpu} · host {host}" if host else gpu


def about_memory(on_device: MemoryTriple | None) -> str:
    """The GPU's part at length."""
    if on_device is None:
        return ""
    allocated, reserved, total = map(_gib, on_device)
    return (
        f"this rank's tensors have {allocated} GiB of the GPU's {total}; torch keeps {reserved} for this rank (other "
        "processes, and CUDA itself, have more)"
    )


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.2f}"


def rank_state(lanes: Sequence[Lane], stand: RankStand) -> str:
    """What a living rank does, in a few words; waiting is for data, so a transfer under way counts as that."""
    if all(position == len(lane.ops) for lane, position in zip(lanes, stand.positions, strict=True)):
        return "done"
    begun = [lane.ops[stand.positions[n]] for n, lane in enumerate(lanes) if stand.started[n]]
    if any(not op.is_transfer for op in begun):
        return "computing"
    if not begun and list(stand.positions) == list(stand.limits):
        return "paused"
    peers = sorted({op.peer for op in begun if op.peer >= 0})
    whom = f" for rank{'s' * (len(peers) > 1)} {', '.join(map(str, peers))}" if peers else ""
    return f"waiting{whom}"

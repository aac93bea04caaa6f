"""Status: what the panel shows beside the map, as JSON. Pure: from a plan and a moment of its run."""

from collections.abc import Sequence

from dinfer.plan.plan import Lane, Plan
from dinfer.results import Breakpoints
from dinfer.run.state import RECOVER, RESTART, Standing
from dinfer.severity import Severity
from dinfer.verdict.where import RankStand, rank_text
from dinfer.views.bins import packed
from dinfer.views.cells import MARKS, STATES, CellMap, cut_line, marked
from dinfer.views.protocol import Json

MemoryTriple = tuple[int, int, int]
"""GPU bytes: in tensors, reserved by torch, total"""

GIB = 1 << 30

MENDS = {RECOVER: "recover and restart", RESTART: "restart", "session.load(": "load again"}
"""by how the call begins after which a run can go on, the name of the button that makes it"""


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
        "severities": {level.word: level.icon for level in Severity},
        "marks": list(MARKS),
    }


def status(plan: Plan, standing: Standing) -> Json:
    """What changes during a run. Of the generated text, each update sends only the last characters."""
    count = plan.world_size
    memory = [*standing.memory, *[None] * count]
    on_device = [*standing.device_memory, *[None] * count]
    tokens = [*standing.tokens, *[0] * count]
    took = [*standing.took, *[""] * count]
    ranks = []
    stands = standing.stands or (None,) * count
    for rank, (lanes, stand) in enumerate(zip(plan.lanes, stands, strict=True)):
        state = "over" if standing.over else rank_state(lanes, stand) if stand else "not known"
        where = rank_text(lanes, stand) if stand else "has not reported its position yet"
        ranks.append(
            {
                "device": standing.devices[rank],
                "memory": memory_text(memory[rank], on_device[rank]),
                "about_memory": about_memory(on_device[rank]),
                "tokens": tokens[rank],
                "state": state if standing.alive[rank] else "lost",
                "done": sum(stand.positions) if stand else 0,
                "total": sum(len(lane.ops) for lane in lanes),
                "where": "; ".join(filter(None, (where, took[rank]))),
            }
        )
    return {
        "state": standing.state,
        "state_severity": (Severity.NOTE if standing.over else standing.state.severity).word,
        "severity": standing.severity.word,
        "remedy": standing.remedy,
        "mend": next((name for call, name in MENDS.items() if standing.remedy.startswith(call)), ""),
        "message": "" if standing.message == standing.over else standing.message,
        "call": standing.last_call,
        "decoded": standing.decoded,
        "text": standing.text[-2000:],
        "faults": list(standing.faults),
        "nonfinite": standing.nonfinite and f"not finite: {standing.nonfinite}",
        "verdict": standing.verdict,
        "playing": standing.playing,
        "over": standing.over and f"this run is over: {standing.over}",
        "ranks": ranks,
    }


def moment(plan: Plan, cells: CellMap, standing: Standing) -> tuple[Json, bytes, Json]:
    """What a panel shows of a run at one moment: what changes, the map's bytes, and notes by block."""
    states = cells.states(standing.stands)
    shown = {**status(plan, standing), "cut": cut_line(states)}
    notes: dict[str, list[str]] = {}
    for mark in standing.marks[:300]:  # more than anyone reads; the map has the marks of all
        notes.setdefault(f"{mark.layer} {mark.chunk}", []).append(f"{mark.severity.mark}: {mark.text}")
    return shown, packed(marked(states, standing.marks)), notes


def breakpoints(found: Breakpoints) -> list[Json]:
    """For the list and the map. `plain`: whether the panel's form can express the breakpoint."""
    return [
        {
            "number": one.number,
            "text": str(one),
            "layer": one.layer,
            "chunk": one.chunk,
            "rank": one.rank,
            "when": one.when,
            "hit": one.hit,
            "enabled": one.enabled,
            "hits": found.hits(one.number),
            "plain": one.op == ("recv" if one.condition == "digest" else "layer"),
        }
        for one in found
    ]


def memory_text(memory: int | None, on_device: MemoryTriple | None) -> str:
    """A rank's memory on its host and its GPU."""
    host = "" if memory is None else f"{memory / GIB:.2f} GiB"
    if on_device is None:
        return host
    gpu = f"{on_device[0] / GIB:.2f} of {on_device[2] / GIB:.0f} GiB"
    return f"{gpu} · host {host}" if host else gpu


def about_memory(on_device: MemoryTriple | None) -> str:
    """The GPU memory in a sentence."""
    if on_device is None:
        return ""
    allocated, reserved, total = (f"{count / GIB:.2f}" for count in on_device)
    return (
        f"this rank's tensors use {allocated} GiB of the GPU's {total}; torch has reserved {reserved} for this rank "
        "(other processes and CUDA itself use more)"
    )


def rank_state(lanes: Sequence[Lane], stand: RankStand) -> str:
    """The state of a rank that runs; a transfer under way counts as waiting."""
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

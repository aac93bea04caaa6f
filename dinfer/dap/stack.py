"""Ranks as threads, and the stack of a rank: Python frames, op, layer, chunk. Pure: plan and stands in, frames out."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from dinfer.dap.listing import RankListing
from dinfer.engine.board import Stand
from dinfer.plan.ops import Op
from dinfer.plan.plan import Lane, Plan
from dinfer.run.state import Standing, State

FrameKind = Literal["python", "op", "layer", "chunk", "decode", "lane", "label"]


class DapFrame(NamedTuple):
    """One frame of a rank. `chunk`, `layer`: what its variables are about, None for none; `path`: a file of Python, ""
    for the rank's plan; `line`: there, 0 for none."""

    name: str
    rank: int
    kind: FrameKind
    chunk: int | None = None
    layer: int | None = None
    path: str = ""
    line: int = 0


class PythonFrame(NamedTuple):
    """`path` is empty for a function in C."""

    function: str
    path: str
    line: int


PythonStacks = Mapping[str, Sequence[PythonFrame]]
"""by thread, the innermost frame first"""


class OpHere(NamedTuple):
    """The op of a lane at which a rank stands. `state`: "under way", "next" or "done"."""

    lane: int
    at: int
    op: Op
    state: str


def thread_name(standing: Standing, rank: int) -> str:
    """For example `rank 1 (cpu)`; of a rank whose process is gone, that."""
    about = standing.devices[rank] if standing.alive[rank] else "gone"
    return f"rank {rank} ({about})"


def ops_here(lanes: Sequence[Lane], stand: Stand) -> list[OpHere]:
    """The ops at which a rank stands, the one that says most first: those under way, one that computes before
    transfers; if none is, the next that computes; at the end of all lanes the last that has computed."""
    begun = [
        OpHere(n, at, lane.ops[at], "under way")
        for n, (lane, at, started) in enumerate(zip(lanes, stand.positions, stand.started, strict=True))
        if started and at < len(lane.ops)
    ]
    if begun:
        return sorted(begun, key=lambda one: one.op.is_transfer)
    ahead = [
        OpHere(n, at, lane.ops[at], "next")
        for n, (lane, at) in enumerate(zip(lanes, stand.positions, strict=True))
        if at < len(lane.ops)
    ]
    if ahead:
        return [min(ahead, key=lambda one: one.op.is_transfer)]
    done = [OpHere(n, len(lane.ops) - 1, lane.ops[-1], "done") for n, lane in enumerate(lanes) if lane.ops]
    return [min(done, key=lambda one: one.op.is_transfer)] if done else []


def _last_computed(lanes: Sequence[Lane], stand: Stand) -> OpHere | None:
    """The last op that has computed, which what is shown of a stop is mostly about."""
    for n, (lane, at) in enumerate(zip(lanes, stand.positions, strict=True)):
        for index in range(at - 1, -1, -1):
            if not lane.ops[index].is_transfer:
                return OpHere(n, index, lane.ops[index], "done")
    return None


def rank_frames(
    plan: Plan,
    standing: Standing,
    listing: RankListing,
    labels: Sequence[str] = (),
    python: PythonStacks | None = None,
) -> list[DapFrame]:
    """The stack of a rank, the innermost frame first. `labels`: the text of each chunk; `python`: what its threads do,
    of which those of lanes in an op are shown."""
    rank, python = listing.rank, python or {}
    if not standing.stands:
        return [DapFrame("not ready yet", rank, "label")]
    lanes = plan.lanes[rank]
    found = list[DapFrame]()
    if standing.decoded or standing.state == State.DECODING:
        found += _python_frames(rank, _thread_of(python, "decode"))
        tokens = f"{standing.decoded} new token{'s' * (standing.decoded != 1)}"
        found.append(DapFrame(f"decode: {tokens}", rank, "decode"))
    here = ops_here(lanes, standing.stands[rank])
    if here:
        inside = _thread_of(python, lanes[here[0].lane].name) if here[0].state == "under way" else ()
        found += _python_frames(rank, python.get(FAILURE, ()) or inside)
        found += _frames_of(plan, listing, here[0], labels)
    if here and here[0].state == "next" and (last := _last_computed(lanes, standing.stands[rank])):
        line = listing.line_of(last.lane, last.at)
        place = _place_of(plan, last.op)
        found.append(DapFrame(f"{last.op} (done last)", rank, "lane", *place, line=line))
    if len(here) > 1:
        found.append(DapFrame("other lanes under way", rank, "label"))
        for one in here[1:]:
            line = listing.line_of(one.lane, one.at)
            name = f"{lanes[one.lane].name}: {one.op}"
            found.append(DapFrame(name, rank, "lane", *_place_of(plan, one.op), line=line))
            found += _python_frames(rank, _thread_of(python, lanes[one.lane].name))
    return found


def _frames_of(plan: Plan, listing: RankListing, one: OpHere, labels: Sequence[str]) -> list[DapFrame]:
    """Of the op, of its layer, of its chunk."""
    shape, rank = plan.shape, listing.rank
    chunk, layer = _place_of(plan, one.op)
    line = listing.line_of(one.lane, one.at)
    said = "done, at the end of prefill" if one.state == "done" else one.state
    found = [DapFrame(f"{one.op} ({said})", rank, "op", chunk, layer, line=line)]
    if layer is not None and one.op.kind != "embed":
        name = f"layer {layer}, of rank {shape.owners[layer]}"
        found.append(DapFrame(name, rank, "layer", chunk, layer, line=line))
    if chunk is not None:
        rows = shape.chunks[chunk]
        text = f" {_short(labels[chunk])!r}" if chunk < len(labels) and labels[chunk].strip() else ""
        name = f"chunk {chunk} of {len(shape.chunks)}: tokens {rows.start}–{rows.stop - 1}{text}"
        first = min(
            (
                listing.line_of(one.lane, n)
                for n, op in enumerate(plan.lanes[rank][one.lane].ops)
                if op.chunk == chunk
            ),
            default=line,
        )
        found.append(DapFrame(name, rank, "chunk", chunk, layer, line=first))
    return found


def _place_of(plan: Plan, op: Op) -> tuple[int | None, int | None]:
    """The chunk and the layer to which an op belongs."""
    shape = plan.shape
    if op.what == "final":
        return len(shape.chunks) - 1, shape.layers - 1
    layer = 0 if op.kind == "embed" else min(op.layer, shape.layers - 1)
    return op.chunk, layer if op.kind != "norm" else None


def _short(text: str, most: int = 32) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


# -- Python's frames

FAILURE = "the exception"
"""the name under which `python_stacks` has the traceback of a rank that has failed"""

_FRAME = re.compile(r'\s+File "(.*)", line (\d+),? in (.*)')
_IN_C = re.compile(r"\s+in (.+) \((.+)\)$")
_DUMPED = re.compile(r"hread 0x[0-9a-f]+ (?:\[(.*?)\] )?\(most")


def python_stacks(text: str) -> dict[str, list[PythonFrame]]:
    """By thread, from the text of a rank's stacks: as the rank gives it, or as faulthandler dumps it."""
    found, current = dict[str, list[PythonFrame]](), list[PythonFrame]()
    for line in text.splitlines():
        if match := _FRAME.fullmatch(line):
            current.append(PythonFrame(match[3], match[1], int(match[2])))
        elif match := _IN_C.fullmatch(line):
            current.append(PythonFrame(f"{match[1]} (C, {match[2]})", "", 0))
        elif line[:1].strip():
            dumped = _DUMPED.search(line)
            name = dumped[1] or line if dumped else line.partition(", which holds")[0].removesuffix(":")
            current = found.setdefault(name, [])
    return found


def traceback_stack(text: str) -> dict[str, list[PythonFrame]]:
    """From the traceback of an exception, in which the innermost frame is the last; of its cause, if it has one, which
    comes first."""
    text = text.partition("\nThe above exception was the direct cause")[0]
    frames = [
        PythonFrame(m[3], m[1], int(m[2])) for line in text.splitlines() if (m := _FRAME.fullmatch(line))
    ]
    return {FAILURE: frames[::-1]} if frames else {}


def _thread_of(stacks: PythonStacks, lane: str) -> Sequence[PythonFrame]:
    """The thread that runs this lane; none where it is not known."""
    return next((frames for name, frames in stacks.items() if name == lane or name.endswith(f" {lane}")), ())


def _python_frames(rank: int, frames: Sequence[PythonFrame]) -> list[DapFrame]:
    return [DapFrame(one.function, rank, "python", path=one.path, line=one.line) for one in frames]

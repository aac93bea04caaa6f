"""From all that a session has heard of its ranks to the signs of life that a verdict is made of."""

from collections.abc import Mapping, Sequence
from itertools import islice
from statistics import median
from typing import Any

from dinfer.engine.hosting.commands import Message
from dinfer.plan.ops import Value
from dinfer.plan.plan import Plan
from dinfer.session.hangs.stacks import Stacks
from dinfer.session.hangs.track import Track
from dinfer.session.job import Job
from dinfer.session.states import STOPPED_S, RankState
from dinfer.trace.events import Event
from dinfer.verdict.signs import Came, Raised, Signs, Sizes

RECENT = 2000
"""events of a rank from which medians are taken"""
BYTES = {"float32": 4, "float64": 8}


def sizes_of(job: Job) -> Sizes:
    spec, dtype = job.spec, job.config.dtype
    itemsize = BYTES.get(spec.dtype if dtype == "auto" else dtype, 2)
    return Sizes(2 * spec.kv_heads * spec.head_dim * itemsize, spec.hidden_size * itemsize)


def signs_of(
    plan: Plan,
    states: Sequence[RankState],
    ended: Mapping[int, str],
    track: Track,
    stacks: Mapping[int, Stacks],
    now: float,
) -> list[Signs]:
    """By rank. `ended`: how the processes of those have ended that have."""
    return [
        _signs(plan, rank, state, ended.get(rank, ""), track, stacks.get(rank, Stacks()), now)
        for rank, state in enumerate(states)
    ]


def _signs(
    plan: Plan, rank: int, state: RankState, ended: str, track: Track, stacks: Stacks, now: float
) -> Signs:
    stand, medians = state.stand, _medians(state.events)
    still = track.still_s(rank, now)
    known = stand is not None and len(still) == len(stand.positions) == len(plan.lanes[rank])
    return Signs(
        positions=stand.positions if stand and known else (),
        started=stand.started if stand and known else (),
        limits=stand.limits if stand and known else (),
        still_s=still if known else (),
        quiet_s=now - state.progressed,
        phase=state.phase if known or state.phase != "prefill" else "starting",
        decoded=state.decoded,
        process=_process(state, now),
        cpu_moves=track.cpu_moves(rank),
        answers=stacks.answers,
        ended=ended,
        raised=_raised(state.reports.get("error")),
        frames=stacks.frames,
        holder=stacks.holder,
        medians=medians,
        links=_links(state.events),
        empty=_ended(plan, rank, state.events, ("send", "recv"), full=False),
        full=_ended(plan, rank, state.events, ("recv",), full=True),
    )


def _process(state: RankState, now: float) -> str | None:
    """A rank that has only just been stopped is not told as that: a debugger may do so in passing."""
    if state.stopped is not None and now - state.stopped < STOPPED_S:
        return None
    return state.process


def _raised(error: Message | None) -> Raised | None:
    if error is None:
        return None
    return Raised(
        error.get("cause") or error["message"],
        error.get("op", ""),
        error.get("lane", ""),
        error["secondary"],
        _came(error.get("came")),
    )


def _came(came: dict[str, Any] | None) -> Came | None:
    if not came:
        return None
    return Came(Value(*came["value"]), came["tokens"], came["nbytes"], came["plan_id"], came["here"])


def _medians(events: Sequence[Event]) -> dict[str, float]:
    """Seconds that an op of each kind takes, without what it waits for its peer."""
    by_kind: dict[str, list[int]] = {}
    for event in islice(reversed(events), RECENT):
        by_kind.setdefault(event.kind, []).append(event.busy)
    return {kind: median(busy) / 1e9 for kind, busy in by_kind.items()}


def _links(events: Sequence[Event]) -> dict[int, float]:
    """Seconds that a block from each rank is on the wire."""
    by_source: dict[int, list[int]] = {}
    for event in islice(reversed(events), RECENT):
        if event.kind == "recv" and event.what == "kv" and event.peer is not None:
            by_source.setdefault(event.peer, []).append(event.busy)
    return {source: median(busy) / 1e9 for source, busy in by_source.items()}


def _ended(
    plan: Plan, rank: int, events: Sequence[Event], kinds: tuple[str, ...], *, full: bool
) -> frozenset[tuple[int, int]]:
    """Transfers that have ended, with their bytes or without one."""
    lanes = {lane.name: number for number, lane in enumerate(plan.lanes[rank])}
    found = (
        e for e in events if e.kind in kinds and bool(e.bytes) == full and e.tokens and e.index is not None
    )
    return frozenset((lanes[e.lane], e.index) for e in found if e.lane in lanes and e.index is not None)

"""Turns what a session knows of its ranks into the signs of life that a verdict is made of."""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from statistics import median
from typing import Any, Self, cast

from dinfer.cluster.ranks import STOPPED_S, RankState
from dinfer.engine.board import Stand
from dinfer.job import Job
from dinfer.messages import Failed, UnexpectedHeader
from dinfer.monitor.stacks import Stacks
from dinfer.plan.ops import Value, ValueKind
from dinfer.plan.plan import Plan
from dinfer.trace.events import Event
from dinfer.verdict.judge import explain
from dinfer.verdict.signs import Came, KvBytes, Raised, Signs, StackFrame
from dinfer.verdict.verdict import Verdict

CPU_WINDOW_S = 2.0

CPU_LEAST_S = 0.9
"""Samples must span so long: CPU time comes twice a second, in hundredths."""

CPU_SHARE = 0.1
"""Of one core. A rank that waits uses less, also while it is asked for its stacks."""

PROCESS_SHARE, PROCESS_LEAST_S = 0.2, 0.02
"""of the CPU time of the process whose threads ranks are: on a busy machine all of it may be less than CPU_SHARE"""

CPU_WANTED = 0.5
"""Of the time. A rank whose thread is runnable for more computes, however little CPU it gets."""


GIL_SHARE = 0.03
"""Of one core. Threads that wait for the GIL wake every 5 ms, and use less together."""


class _RankTrack:
    def __init__(self) -> None:
        self.stand: Stand | None = None
        self.since: list[float] = []
        self.cpu: deque[tuple[float, float, float]] = deque()
        self.wants_cpu = 0.0


class Track:
    """How the ranks of one run have moved lately. Cheap, since it is called often while nothing is wrong."""

    def __init__(self, world_size: int) -> None:
        self._ranks = [_RankTrack() for _ in range(world_size)]

    def look(self, states: Sequence[RankState], now: float) -> None:
        for rank, state in zip(self._ranks, states, strict=True):
            if state.stand is not rank.stand and state.stand is not None:
                self._moved(rank, state.stand, state.progressed)
            rank.wants_cpu = state.wants_cpu
            if state.cpu_s is not None:
                _note(rank.cpu, now, state.cpu_s)

    def note_cpu(self, rank: int, now: float, cpu_s: float, process_s: float = 0.0) -> None:
        """CPU time of a rank whose reports do not have it: its threads' sum, and that of the process they are in."""
        _note(self._ranks[rank].cpu, now, cpu_s, process_s)

    def still_s(self, rank: int, now: float) -> tuple[float, ...]:
        """Seconds for which each lane has not moved."""
        return tuple(now - since for since in self._ranks[rank].since)

    def cpu_moves(self, rank: int, *, mute: bool = False) -> bool | None:
        """Whether its CPU time moves, or would on a less busy machine; None: not known yet. `mute`: its Python does not
        answer, so its threads wait for the GIL and look runnable."""
        wants = self._ranks[rank].wants_cpu > CPU_WANTED
        if wants and not mute:
            return True
        samples = self._ranks[rank].cpu
        if not samples or samples[-1][0] - samples[0][0] < CPU_LEAST_S:
            return None
        (begin, first, process_first), (end, last, process_last) = samples[0], samples[-1]
        used, by_process = last - first, process_last - process_first
        is_most = by_process > 0 and used > max(PROCESS_SHARE * by_process, PROCESS_LEAST_S)
        return used / (end - begin) > (GIL_SHARE if wants else CPU_SHARE) or is_most

    def longest_s(self, now: float) -> float:
        """The longest time for which a lane has not moved that is in an op, or may begin one."""
        return max((now - since for rank in self._ranks for since in _open(rank)), default=0.0)

    def _moved(self, rank: _RankTrack, stand: Stand, at: float) -> None:
        before = rank.stand
        if before is None or len(before.positions) != len(stand.positions):
            rank.since = [at] * len(stand.positions)
        else:
            old = zip(before.positions, before.started, strict=True)
            new = zip(stand.positions, stand.started, strict=True)
            changes = [one != other for one, other in zip(old, new, strict=True)]
            freed = [a <= p for a, p in zip(before.limits, stand.positions, strict=True)]
            for number, changed in enumerate(changes):
                if changed or (freed[number] and stand.limits[number] > stand.positions[number]):
                    rank.since[number] = at
        rank.stand = stand


def _open(rank: _RankTrack) -> list[float]:
    if rank.stand is None:
        return []
    lanes = zip(rank.since, rank.stand.positions, rank.stand.started, rank.stand.limits, strict=True)
    return [since for since, at, started, limit in lanes if started or at < limit]


def _note(
    samples: deque[tuple[float, float, float]], now: float, cpu_s: float, process_s: float = 0.0
) -> None:
    """At most one sample a tenth of a second, so that those of two seconds are few."""
    if samples and now - samples[-1][0] < 0.1:
        return
    samples.append((now, cpu_s, process_s))
    while len(samples) > 2 and now - samples[1][0] > CPU_WINDOW_S:
        samples.popleft()


RECENT = 2000
"""How many of a rank's last events medians are taken of."""

BYTES = {"float32": 4, "float64": 8}


def sizes_of(job: Job) -> KvBytes:
    spec, dtype = job.spec, job.config.dtype
    itemsize = BYTES.get(spec.dtype if dtype == "auto" else dtype, 2)
    return KvBytes(2 * spec.kv_heads * spec.head_dim * itemsize, spec.hidden_size * itemsize)


def signs_of(
    plan: Plan,
    states: Sequence[RankState],
    ended: Mapping[int, str],
    track: Track,
    stacks: Mapping[int, Stacks],
    now: float,
) -> list[Signs]:
    """By rank. `ended`: how processes have ended, by rank."""
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
        cpu_moves=track.cpu_moves(rank, mute=stacks.answers is False),
        answers=stacks.answers,
        ended=ended,
        raised=_raised(state.error),
        frames=stacks.frames,
        holder=stacks.holder,
        medians=medians,
        links=_links(state.events),
        empty=_ended(plan, rank, state.events, ("send", "recv"), full=False),
        full=_ended(plan, rank, state.events, ("recv",), full=True),
    )


def _process(state: RankState, now: float) -> str | None:
    """A process that has only just been stopped does not count as stopped: a debugger may stop it in passing."""
    if state.stopped is not None and now - state.stopped < STOPPED_S:
        return None
    return state.process


def _raised(error: Failed | None) -> Raised | None:
    if error is None:
        return None
    return Raised(error.cause or error.message, error.op, error.lane, error.secondary, _came(error.came))


def _came(came: UnexpectedHeader | None) -> Came | None:
    if came is None:
        return None
    what, chunk, layer = came.value
    return Came(Value(cast(ValueKind, what), chunk, layer), came.tokens, came.nbytes, came.plan_id, came.here)


def _medians(events: Sequence[Event]) -> dict[str, float]:
    """Median seconds of an op, by kind, without the time it waits for its peer."""
    by_kind: dict[str, list[int]] = {}
    for event in islice(reversed(events), RECENT):
        by_kind.setdefault(event.kind, []).append(event.busy)
    return {kind: median(busy) / 1e9 for kind, busy in by_kind.items()}


def _links(events: Sequence[Event]) -> dict[int, float]:
    """Median seconds that a block is on the wire, by the rank that sent it."""
    by_source: dict[int, list[int]] = {}
    for event in islice(reversed(events), RECENT):
        if event.kind == "recv" and event.what == "kv" and event.peer is not None:
            by_source.setdefault(event.peer, []).append(event.busy)
    return {source: median(busy) / 1e9 for source, busy in by_source.items()}


def _ended(
    plan: Plan, rank: int, events: Sequence[Event], kinds: tuple[str, ...], *, full: bool
) -> frozenset[tuple[int, int]]:
    """Transfers that have ended, as (lane, index): with their bytes (`full`), or with none."""
    lanes = {lane.name: number for number, lane in enumerate(plan.lanes[rank])}
    found = (
        e for e in events if e.kind in kinds and bool(e.bytes) == full and e.tokens and e.index is not None
    )
    return frozenset((lanes[e.lane], e.index) for e in found if e.lane in lanes and e.index is not None)


SETS = ("empty", "full")
"""Fields of Signs that are sets of (lane, index)."""


@dataclass(frozen=True)
class HangEvidence:
    """What a verdict was made of. `signs`: by rank; `stacks`: texts, by rank; `ahead_s`: as in `explain`; `told`: the
    sentence that users have read."""

    signs: tuple[Signs, ...]
    sizes: KvBytes
    stacks: Mapping[int, str]
    ahead_s: float = 0.0
    told: str = ""

    def judge(self, plan: Plan) -> Verdict:
        """The verdict that follows, with the sentence that was told."""
        found = explain(plan, self.signs, self.sizes, self.stacks, ahead_s=self.ahead_s)
        return replace(found, sentence=self.told) if self.told else found

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        signs = [{**asdict(its), **{name: sorted(getattr(its, name)) for name in SETS}} for its in self.signs]
        plain: dict[str, Any] = json.loads(json.dumps({**asdict(self), "signs": signs}))
        return plain

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From JSON values. Raises KeyError, TypeError or ValueError where they do not describe evidence."""
        stacks = {int(rank): text for rank, text in values["stacks"].items()}
        signs = tuple(map(_signs_of, values["signs"]))
        return cls(signs, KvBytes(*values["sizes"]), stacks, values["ahead_s"], values["told"])


def _signs_of(values: Mapping[str, Any]) -> Signs:
    lists = {name: tuple(values[name]) for name in ("positions", "started", "limits", "still_s")}
    sets = {name: frozenset((lane, index) for lane, index in values.get(name, ())) for name in SETS}
    return Signs(
        **{
            **values,
            **lists,
            **sets,
            "raised": _raised_of(values["raised"]) if values["raised"] else None,
            "frames": {lane: StackFrame(*frame) for lane, frame in values["frames"].items()},
            "links": {int(source): seconds for source, seconds in values["links"].items()},
        }
    )


def _raised_of(values: Sequence[Any]) -> Raised:
    message, op, lane, secondary, came = values
    found = Came(Value(*came[0]), *came[1:]) if came else None
    return Raised(message, op, lane, secondary, found)

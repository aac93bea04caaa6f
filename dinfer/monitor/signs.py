"""Turns what a session knows of its ranks into the signs of life that a verdict is made of."""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import median
from typing import Any, Self, TypeVar, cast

import msgspec

from dinfer.cluster.ranks import STOPPED_S, RankState
from dinfer.engine.board import Stand
from dinfer.messages import Failed
from dinfer.monitor.stacks import Stacks
from dinfer.plan.ops import Value, ValueKind
from dinfer.plan.plan import Plan
from dinfer.trace.events import Event
from dinfer.verdict.judge import explain
from dinfer.verdict.signs import Came, KvBytes, Raised, Signs
from dinfer.verdict.verdict import Verdict

K = TypeVar("K")

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
"""Of one core. Threads that wait for the GIL wake every 5 ms: each uses less, on a fast machine all together."""

RECENT = 2000
"""How many of a rank's last events medians are taken of."""


@dataclass
class _RankTrack:
    stand: Stand | None = None
    since: list[float] = field(default_factory=list)
    """since when each lane has not moved"""
    cpu: deque[tuple[float, float, float]] = field(default_factory=deque)
    """when, and CPU seconds of the rank and of its process"""
    wants_cpu: float = 0.0
    thread_cpu: float | None = None


class Track:
    """How the ranks of one run have moved lately. Cheap, since it is called often while nothing is wrong."""

    def __init__(self, world_size: int) -> None:
        self._ranks = [_RankTrack() for _ in range(world_size)]

    def look(self, states: Sequence[RankState], now: float) -> None:
        for number, (rank, state) in enumerate(zip(self._ranks, states, strict=True)):
            if state.stand is not rank.stand and state.stand is not None:
                _move(rank, state.stand, state.progressed)
            rank.wants_cpu, rank.thread_cpu = state.wants_cpu, state.thread_cpu
            if state.cpu_s is not None:
                self.add_cpu(number, now, state.cpu_s)

    def add_cpu(self, rank: int, now: float, cpu_s: float, process_s: float = 0.0) -> None:
        """CPU time of a rank. Where its reports do not have it: its threads' sum, and that of the process they are in.

        At most one sample a tenth of a second is kept, so that those of two seconds are few.
        """
        samples = self._ranks[rank].cpu
        if not samples or now - samples[-1][0] >= 0.1:
            samples.append((now, cpu_s, process_s))
            while len(samples) > 2 and now - samples[1][0] > CPU_WINDOW_S:
                samples.popleft()

    def still_s(self, rank: int, now: float) -> tuple[float, ...]:
        """Seconds for which each lane has not moved."""
        return tuple(now - since for since in self._ranks[rank].since)

    def cpu_moves(self, rank: int, *, mute: bool = False) -> bool | None:
        """Whether its CPU time moves, or would on a less busy machine; None: not known yet. `mute`: its Python does not
        answer, so its threads wait for the GIL: they look runnable, and use some CPU time together."""
        wants, samples = self._ranks[rank].wants_cpu > CPU_WANTED, self._ranks[rank].cpu
        if wants and not mute:
            return True
        if mute and (busiest := self._ranks[rank].thread_cpu) is not None:
            return busiest > GIL_SHARE  # who holds the GIL and computes is one thread
        if not samples or samples[-1][0] - samples[0][0] < CPU_LEAST_S:
            return None
        (begin, first, process_first), (end, last, process_last) = samples[0], samples[-1]
        used, by_process = last - first, process_last - process_first
        is_most = by_process > 0 and used > max(PROCESS_SHARE * by_process, PROCESS_LEAST_S)
        return used / (end - begin) > (GIL_SHARE if wants else CPU_SHARE) or is_most

    def longest_s(self, now: float) -> float:
        """The longest time for which a lane has not moved that is in an op, or may begin one."""
        still = [0.0]
        for rank in self._ranks:
            if stand := rank.stand:
                lanes = zip(rank.since, stand.positions, stand.started, stand.limits, strict=True)
                still += [now - since for since, at, started, limit in lanes if started or at < limit]
        return max(still)


def _move(rank: _RankTrack, stand: Stand, at: float) -> None:
    before, rank.stand = rank.stand, stand
    if before is None or len(before.positions) != len(stand.positions):
        rank.since = [at] * len(stand.positions)
        return
    for lane, position in enumerate(stand.positions):
        has_moved = (before.positions[lane], before.started[lane]) != (position, stand.started[lane])
        if has_moved or before.limits[lane] <= position < stand.limits[lane]:  # it has moved, or been let go
            rank.since[lane] = at


def signs_of(
    plan: Plan, rank: int, state: RankState, ended: str, track: Track, stacks: Stacks, now: float
) -> Signs:
    """Of one rank. `ended`: how its process has ended, if it has."""
    stand, still, lanes = state.stand, track.still_s(rank, now), plan.lanes[rank]
    if not stand or not len(still) == len(stand.positions) == len(lanes):
        stand, still = None, ()
    # A debugger, or py-spy, may stop a process in passing: one that has only just been stopped does not count.
    is_new = state.stopped is not None and now - state.stopped < STOPPED_S
    numbers = {lane.name: number for number, lane in enumerate(lanes)}
    ends = [
        (event, (numbers[event.lane], event.index))
        for event in state.events
        if event.kind in ("send", "recv")
        and event.tokens
        and event.index is not None
        and event.lane in numbers
    ]
    return Signs(
        positions=stand.positions if stand else (),
        started=stand.started if stand else (),
        limits=stand.limits if stand else (),
        still_s=still,
        quiet_s=now - state.progressed,
        phase=state.phase if stand or state.phase != "prefill" else "starting",
        decoded=state.decoded,
        process=None if is_new else state.process,
        cpu_moves=track.cpu_moves(rank, mute=stacks.answers is False),
        answers=stacks.answers,
        ended=ended,
        raised=_raised(state.error),
        frames=stacks.frames,
        holder=stacks.holder,
        medians=_medians(state.events, lambda event: event.kind),
        links=_medians(
            state.events, lambda event: event.peer if (event.kind, event.what) == ("recv", "kv") else None
        ),
        empty=frozenset(place for event, place in ends if not event.bytes),
        full=frozenset(place for event, place in ends if event.bytes and event.kind == "recv"),
    )


def _raised(error: Failed | None) -> Raised | None:
    if error is None:
        return None
    came = None
    if header := error.came:
        what, chunk, layer = header.value
        value = Value(cast(ValueKind, what), chunk, layer)
        came = Came(value, header.tokens, header.nbytes, header.plan_id, header.here)
    return Raised(error.cause or error.message, error.op, error.lane, error.secondary, came)


def _medians(events: Sequence[Event], of: Callable[[Event], K | None]) -> dict[K, float]:
    """Median seconds of the last ops, without the time that they waited for their peers, by what `of` returns."""
    times: defaultdict[K, list[int]] = defaultdict(list)
    for event in islice(reversed(events), RECENT):
        if (key := of(event)) is not None:
            times[key].append(event.busy)
    return {key: median(busy) / 1e9 for key, busy in times.items()}


class HangEvidence(msgspec.Struct, frozen=True, rename={"sentence": "told"}):
    """What a verdict was made of. `signs`: by rank; `stacks`: texts, by rank; `ahead_s`: as in `explain`; `sentence`:
    the one that users have read."""

    signs: tuple[Signs, ...]
    sizes: KvBytes
    stacks: dict[int, str]
    ahead_s: float = 0.0
    sentence: str = ""

    def judge(self, plan: Plan) -> Verdict:
        """The verdict that follows, with the sentence that users have read."""
        found = explain(plan, self.signs, self.sizes, self.stacks, ahead_s=self.ahead_s)
        return replace(found, sentence=self.sentence) if self.sentence else found

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values: dict[str, Any] = msgspec.to_builtins(self, str_keys=True)
        for signs in values["signs"]:  # only sets are sorted: of frames, the first one counts
            signs |= {name: sorted(signs[name]) for name in ("empty", "full")}
        return values

    @classmethod
    def of_json(cls, text: bytes | msgspec.Raw) -> Self:
        """From JSON. Raises ValueError where it does not describe evidence."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ValueError(f"evidence of another form: {error}") from None

"""Track: since when each lane of each rank has not moved, and whether CPU time moves; from states that are heard."""

from collections import deque
from collections.abc import Sequence

from dinfer.engine.board import Stand
from dinfer.session.states import RankState

CPU_WINDOW_S = 2.0
CPU_LEAST_S = 0.9
"""CPU time is heard of twice a second, in hundredths"""
CPU_SHARE = 0.1
"""of one core: a rank that waits uses less, also where it is asked for its stacks"""
CPU_WANTED = 0.5
"""of the time: one that wants the CPU for more computes, however little it gets; one that waits is seldom seen to"""


class _Rank:
    def __init__(self) -> None:
        self.stand: Stand | None = None
        self.since: list[float] = []
        self.cpu: deque[tuple[float, float]] = deque()
        self.wants_cpu = 0.0


class Track:
    """Of the ranks of one run. Cheap: called often, also while nothing is wrong."""

    def __init__(self, world_size: int) -> None:
        self._ranks = [_Rank() for _ in range(world_size)]

    def look(self, states: Sequence[RankState], now: float) -> None:
        for rank, state in zip(self._ranks, states, strict=True):
            if state.stand is not rank.stand and state.stand is not None:
                self._moved(rank, state.stand, state.progressed)
            rank.wants_cpu = state.wants_cpu
            if state.cpu_s is not None:
                _note(rank.cpu, now, state.cpu_s)

    def note_cpu(self, rank: int, now: float, cpu_s: float) -> None:
        """CPU time of a rank of which no state tells it."""
        _note(self._ranks[rank].cpu, now, cpu_s)

    def still_s(self, rank: int, now: float) -> tuple[float, ...]:
        """For how long each lane has not moved."""
        return tuple(now - since for since in self._ranks[rank].since)

    def cpu_moves(self, rank: int) -> bool | None:
        """Whether its CPU time has moved lately, or would have on a machine that does less; None: not known yet."""
        if self._ranks[rank].wants_cpu > CPU_WANTED:
            return True
        samples = self._ranks[rank].cpu
        if not samples or samples[-1][0] - samples[0][0] < CPU_LEAST_S:
            return None
        (begin, first), (end, last) = samples[0], samples[-1]
        return (last - first) / (end - begin) > CPU_SHARE

    def longest_s(self, now: float) -> float:
        """For how long the lane has not moved that has begun an op, or may, and has moved least lately."""
        return max((now - since for rank in self._ranks for since in _open(rank)), default=0.0)

    def _moved(self, rank: _Rank, stand: Stand, at: float) -> None:
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


def _open(rank: _Rank) -> list[float]:
    if rank.stand is None:
        return []
    lanes = zip(rank.since, rank.stand.positions, rank.stand.started, rank.stand.limits, strict=True)
    return [since for since, at, started, limit in lanes if started or at < limit]


def _note(samples: deque[tuple[float, float]], now: float, cpu_s: float) -> None:
    """At most one sample a tenth of a second, so that those of two seconds are few."""
    if samples and now - samples[-1][0] < 0.1:
        return
    samples.append((now, cpu_s))
    while len(samples) > 2 and now - samples[1][0] > CPU_WINDOW_S:
        samples.popleft()

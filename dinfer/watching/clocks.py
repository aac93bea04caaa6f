"""Brings the records of several hosts onto one clock, where their clocks are apart.

No message arrives before it is sent, and nobody leaves a barrier before all have come: what ranks did together bounds
how far a host's clock is off, from both sides where messages went both ways. A clock within its bounds, and within a
second, is left as it is: no message of such a record runs backwards.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from math import inf
from statistics import median

from dinfer.trace.events import Event
from dinfer.trace.flight import groups_of
from dinfer.verdict.matching import MatchedOps
from dinfer.verdict.where import seconds_text
from dinfer.watch.probe.records import RaisedError, WatchedProcess
from dinfer.watching.events import ranks_of, trace_of

APART_NS = 1_000_000_000

MOST = 2000
"""ops of a process that are looked at, the last"""

ALL_WAIT = frozenset(("barrier", "all_reduce", "all_gather", "reduce_scatter"))
"""What ends on no rank before it has begun on all. Not `all_to_all`: a rank to which others send nothing need not wait
for them."""


@dataclass
class Apart:
    """How far one clock is ahead of another, in nanoseconds. `ends`: by how much later what both took part in ended by
    it."""

    low: float = -inf
    high: float = inf
    ends: list[int] = field(default_factory=list)

    def estimate(self) -> tuple[int, float]:
        """How far, and by how much that may be wrong; infinity where messages went one way only, or contradict."""
        middle = median(self.ends)
        if self.low > self.high:
            return int(middle), inf
        if -inf < self.low and self.high < inf:
            return int((self.low + self.high) / 2), (self.high - self.low) / 2
        return int(min(max(middle, self.low), self.high)), inf

    def allows(self, by: float) -> bool:
        return self.low <= by <= self.high or self.low > self.high


def on_one_clock(ranks: Iterable[WatchedProcess]) -> tuple[list[WatchedProcess], list[str]]:
    """The ranks of one job, those of hosts whose clock is off with other times; and what was done, in words."""
    processes = list(ranks)
    hosts = sorted({process.host for process in processes if process.rank is not None})
    if len(hosts) < 2:
        return list(processes), []
    known: dict[str, tuple[int, float]] = {hosts[0]: (0, 0.0)}
    backwards = set[str]()
    apart = _apart(processes)
    for _ in hosts:  # a host may share ops with another alone
        for (one, other), found in apart.items():
            if one in known and other not in known:
                by, error = found.estimate()
                known[other] = known[one][0] + by, known[one][1] + error
                if not found.allows(0) or one in backwards:
                    backwards.add(other)
    off = {
        host: (by, error) for host, (by, error) in known.items() if abs(by) > APART_NS or host in backwards
    }
    notes = [
        f"the clock of {host} is {seconds_text(abs(by) / 1e9)} {'ahead of' if by > 0 else 'behind'} that of "
        f"{hosts[0]}: its times are told by the clock of {hosts[0]}{_error_text(error)}"
        for host, (by, error) in off.items()
    ]
    return [_shifted(one, -off[one.host][0]) if one.host in off else one for one in processes], notes


def _error_text(error: float) -> str:
    if error == inf:
        return ", but how exactly is not known: no messages went both ways"
    return f", right to {seconds_text(error / 1e9)}"


def _apart(processes: Sequence[WatchedProcess]) -> dict[tuple[str, str], Apart]:
    """By two hosts, how far the clock of the second is ahead of that of the first."""
    ranks = ranks_of(processes)
    recent = {rank: replace(process, ops=process.ops[-MOST:]) for rank, process in ranks.items()}
    trace = trace_of(recent)
    ops = MatchedOps(trace.events, groups_of(trace))
    found: defaultdict[tuple[str, str], Apart] = defaultdict(Apart)
    for events, waiting in _together(ops):
        hosts = defaultdict[str, list[Event]](list)
        for event in events:
            if event.end and event.rank in ranks:
                hosts[ranks[event.rank].host].append(event)
        for one, other in permutations(hosts, 2):
            end, other_end = (min(event.end for event in hosts[host]) for host in (one, other))
            apart = found[one, other]
            apart.ends.append(other_end - end)
            begun = max(event.ready for event in hosts[one]), max(event.ready for event in hosts[other])
            if all(event.kind in waiting for event in hosts[other]):
                apart.high = min(apart.high, other_end - begun[0])
            if all(event.kind in waiting for event in hosts[one]):
                apart.low = max(apart.low, begun[1] - end)
    return dict(found)


def _together(ops: MatchedOps) -> Iterator[tuple[list[Event], frozenset[str]]]:
    """The parts of each message and collective, and of which kind those are that do not end before all have begun."""
    for send, recv in ops.messages():
        yield [send.event, recv.event], frozenset(("recv",))
    for parts in ops.collectives():
        yield [op.event for op in parts.values()], ALL_WAIT


def _shifted(process: WatchedProcess, by: int) -> WatchedProcess:
    """A copy, all of whose times are other ones."""

    def later(at: int) -> int:
        return at and at + by

    def raised_later(error: RaisedError) -> RaisedError:
        return error._replace(at_ns=later(error.at_ns))

    return replace(
        process,
        clock=process.clock + by,
        started_ns=later(process.started_ns),
        heartbeat_ns=later(process.heartbeat_ns),
        ops=[
            op._replace(
                issued_ns=later(op.issued_ns), waited_ns=later(op.waited_ns), done_ns=later(op.done_ns)
            )
            for op in process.ops
        ],
        exception=process.exception and raised_later(process.exception),
        handled=[raised_later(error) for error in process.handled],
        stacks=[taken._replace(at_ns=later(taken.at_ns)) for taken in process.stacks],
    )

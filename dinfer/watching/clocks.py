"""Brings the records of several hosts onto one clock, where their clocks are far apart.

What ranks do together ends on all of them at about the same time: the median of the differences says how far a host's
clock is off. Clocks that agree within a second are left as they are.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median

from dinfer.trace.flight import groups_of
from dinfer.verdict.matching import MatchedOps
from dinfer.verdict.where import seconds_text
from dinfer.watch.probe.records import RaisedError, WatchedProcess
from dinfer.watching.events import ranks_of, trace_of

APART_NS = 1_000_000_000

MOST = 2000
"""ops of a process that are looked at, the last"""


def on_one_clock(ranks: Iterable[WatchedProcess]) -> tuple[list[WatchedProcess], list[str]]:
    """The ranks of one job, those of hosts whose clock is off with other times; and what was done, in words."""
    processes = list(ranks)
    hosts = sorted({process.host for process in processes if process.rank is not None})
    if len(hosts) < 2:
        return list(processes), []
    offsets = {hosts[0]: 0}
    differences = _differences(processes)
    for _ in hosts:  # a host may share ops with another alone
        for (one, other), found in differences.items():
            if one in offsets and other not in offsets:
                offsets[other] = offsets[one] + int(median(found))
    far = {host: by for host, by in offsets.items() if abs(by) > APART_NS}
    notes = [
        f"the clock of {host} is {seconds_text(abs(by) / 1e9)} {'ahead of' if by > 0 else 'behind'} that of "
        f"{hosts[0]}: its times are told by the clock of {hosts[0]}"
        for host, by in far.items()
    ]
    return [_shifted(one, -far[one.host]) if one.host in far else one for one in processes], notes


def _differences(processes: Sequence[WatchedProcess]) -> dict[tuple[str, str], list[int]]:
    """By two hosts, by how much later what both took part in ended by the clock of the second."""
    ranks = ranks_of(processes)
    recent = {rank: replace(process, ops=process.ops[-MOST:]) for rank, process in ranks.items()}
    trace = trace_of(recent)
    ops = MatchedOps(trace.events, groups_of(trace))
    found: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    together = [
        *ops.collectives(),
        *({one.event.rank: one, two.event.rank: two} for one, two in ops.messages()),
    ]
    for parts in together:
        ended = [
            (ranks[rank].host, op.event.end) for rank, op in parts.items() if op.event.end and rank in ranks
        ]
        for (host, end), (other, other_end) in pairwise(ended):
            if host != other:
                found[host, other].append(other_end - end)
                found[other, host].append(end - other_end)
    return found


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

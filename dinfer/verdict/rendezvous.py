"""Would this order of ops hang if every send waited for its recv? Plays it, and has the outcome judged. Pure.

Small messages are buffered by most backends, so an order in which all ranks send first runs for years, and hangs once
the messages have grown. Each thread does its ops in the order in which they were issued; what it waited for later, it
waits for later.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from dinfer.trace.events import Event, Group
from dinfer.verdict.matching import MESSAGES, MatchedOps, RecordedOp
from dinfer.verdict.recorded import explain_events
from dinfer.verdict.signs import Signs
from dinfer.verdict.verdict import Verdict


class Step(NamedTuple):
    """What a thread does next: it issues an op, or waits for one."""

    op: RecordedOp
    waits: bool


class Played(NamedTuple):
    """The outcome: the ops as events, those that were never over with no end; the ranks that came to their end."""

    events: tuple[Event, ...]
    ended: frozenset[int]

    @property
    def hangs(self) -> bool:
        return any(not event.end for event in self.events)


def rendezvous_verdict(events: Iterable[Event], groups: Mapping[str, Group] | None = None) -> Verdict:
    """The verdict on a run of the same order with sends that wait for their recvs; its kind is "done" if it would come
    to its end."""
    found = list(events)
    ops = MatchedOps(found, groups or {})
    return judged(play(ops, programs_of(ops)), groups)


def judged(played: Played, groups: Mapping[str, Group] | None = None) -> Verdict:
    """Why what was played does not go on."""
    signs = {event.rank: Signs() for event in played.events} | {
        rank: Signs(phase="done") for rank in played.ended
    }
    return explain_events(played.events, signs, groups=groups)


def programs_of(ops: MatchedOps) -> list[list[Step]]:
    """What each thread of each rank did, in its order."""
    threads: dict[tuple[int, str], list[tuple[int, int, int, Step]]] = defaultdict(list)
    for rank, mine in ops.by_rank.items():
        for op in mine:
            event, call = op.event, op.event.call
            if op.channel is None and event.kind not in MESSAGES:
                continue
            steps = threads[rank, event.lane]
            steps.append((event.ready, op.order, 0, Step(op, waits=False)))
            if call is None or not call.is_async:
                steps.append((event.ready, op.order, 1, Step(op, waits=True)))
            elif call.is_waited:
                steps.append((max(event.start, event.ready), op.order, 1, Step(op, waits=True)))
    return [[one[-1] for one in sorted(steps, key=lambda one: one[:3])] for steps in threads.values()]


def play(ops: MatchedOps, programs: Sequence[Sequence[Step]]) -> Played:
    """Play the programs until nothing goes on."""
    issued: set[RecordedOp] = set()
    at = [0] * len(programs)
    moved = True
    while moved:
        moved = False
        for number, steps in enumerate(programs):
            while at[number] < len(steps):
                step = steps[at[number]]
                if not step.waits:
                    issued.add(step.op)
                elif not _is_met(ops, step.op, issued):
                    break
                at[number] += 1
                moved = True
    waited = {
        steps[position].op for steps, position in zip(programs, at, strict=True) if position < len(steps)
    }
    open_ranks = {op.event.rank for op in waited}
    events = []
    for mine in ops.by_rank.values():
        for op in mine:
            if op in waited:
                events.append(_open(op.event))
            elif op in issued or (op.channel is None and op.event.kind not in MESSAGES):
                end = op.event.end or op.event.ready + 1
                events.append(replace(op.event, end=max(end, op.event.start), met=op.event.start))
    ended = frozenset(ops.by_rank) - open_ranks
    return Played(tuple(events), ended)


def _open(event: Event) -> Event:
    call = event.call and replace(event.call, is_waited=True)
    return replace(event, end=0, call=call)


def _is_met(ops: MatchedOps, op: RecordedOp, issued: set[RecordedOp]) -> bool:
    """Whether all who take part in an op have issued it."""
    event = op.event
    if event.kind in MESSAGES:
        if event.peer is None or not ops.is_matchable(op) or event.peer not in ops.by_rank:
            return bool(event.end)  # who sent it, or when, is not in the record
        return ops.other_end(op) in issued
    others = [rank for rank in ops.ranks_of(op) if rank in ops.by_rank]
    return all(ops.joined(op, rank) in issued for rank in others)

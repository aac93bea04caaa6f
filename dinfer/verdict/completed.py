"""What went wrong although it ended: findings in the recorded ops of other people's code. Pure.

A hang has a verdict; these are for what no rank notices: a message that another shape of tensor received, two messages
that changed places, a wait that nobody made, a send that nobody received, a rank that all others wait for every time.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from dinfer.trace.events import COLLECTIVES, Event, Group
from dinfer.verdict.left_out import left_out
from dinfer.verdict.matching import MAKING, MatchedOps, RecordedOp
from dinfer.verdict.op_text import full_text, left_out_text
from dinfer.verdict.recorded_waits import difference
from dinfer.verdict.where import ranks_text, seconds_text

MOST = 100
"""findings of one kind; the same line of code tends to repeat them"""

SLOW_OPS, SLOW_SHARE, SLOW_LAG_S, SLOW_PART = 8, 0.8, 0.05, 0.2
"""A rank is slow if, in at least so many collectives and that share of them, it comes last, by so many seconds in the
median; and these add up to that part of the time."""

Arrivals = Sequence[tuple[int, int]]
"""when each rank came to a collective, in nanoseconds, and which; the first first"""

SLOW_SPAN_NS = 60 * 1_000_000_000
"""Spans of so long are judged by themselves, too: a session may go well for hours before and after."""


@dataclass(frozen=True)
class OpFinding:
    """One finding. `ranks`: the one to blame first; `line`: of the code to look at, such as `infer.py:31`."""

    kind: str
    ranks: tuple[int, ...]
    text: str
    layer: int | None = None
    chunk: int | None = None
    line: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return self.text


def findings_of_events(
    events: Iterable[Event], groups: Mapping[str, Group] | None = None, ended: Iterable[int] = ()
) -> list[OpFinding]:
    """All findings. `ended`: the ranks whose programs have ended: what they have not done yet, they never do."""
    ops = MatchedOps(events, groups or {})
    over = set(ended)
    found = [
        *_mismatches(ops),
        *_other_collectives(ops),
        *_left_out(ops),
        *_never_received(ops, over),
        *_never_waited(ops, over),
        *_uneven_groups(ops),
        *_slow_ranks(ops),
    ]
    counts: defaultdict[str, int] = defaultdict(int)
    kept = []
    for one in found:
        counts[one.kind] += 1
        if counts[one.kind] <= MOST:
            kept.append(one)
    return kept


def _finding(kind: str, ops: Sequence[RecordedOp], text: str) -> OpFinding:
    """About these ops, the one to blame first."""
    first = ops[0].event
    ranks = tuple(dict.fromkeys(op.event.rank for op in ops))
    return OpFinding(kind, ranks, text, first.layer, first.chunk, (first.call and first.call.place) or None)


# -- messages


def _mismatches(ops: MatchedOps) -> Iterator[OpFinding]:
    """Messages that ended and do not fit: another size or dtype, or two of one link that changed places."""
    by_link: defaultdict[object, list[tuple[RecordedOp, RecordedOp]]] = defaultdict(list)
    for send, recv in ops.messages():
        if send.event.end and recv.event.end:
            by_link[send.channel].append((send, recv))
    for pairs in by_link.values():
        crossed = list(_crossed(pairs))
        for one, other in crossed:
            (send, recv), (later, later_recv) = one, other
            text = (
                f"messages crossed: rank {send.event.rank} sent {full_text(send.event)} and then "
                f"{full_text(later.event)}; rank {recv.event.rank} received the first by {full_text(recv.event)} and "
                f"the second by {full_text(later_recv.event)}"
            )
            yield _finding("crossed", (recv, send), text)
        apart = {id(op) for pair in crossed for one in pair for op in one}
        is_usual = 2 * sum(_shape_of(one) == _shape_of(other) for one, other in pairs) > len(pairs)
        for send, recv in pairs:
            if id(send) not in apart and (wrong := difference(send.event, recv.event)):
                text = (
                    f"rank {recv.event.rank}'s {full_text(recv.event)} has received rank {send.event.rank}'s "
                    f"{full_text(send.event)}, which is {wrong[1].partition(':')[0].removeprefix('has ')}"
                    f"{_bytes_text(send.event, recv.event)}: both have ended as if all were right"
                )
                yield _finding("other size", (send, recv), text)
            elif is_usual and id(send) not in apart and _have_other_shapes(send, recv):
                text = (
                    f"rank {recv.event.rank}'s {full_text(recv.event)} has received rank {send.event.rank}'s "
                    f"{full_text(send.event)}: another message than it was made for, though it has as many bytes"
                )
                yield _finding("other shape", (recv, send), text)


def _have_other_shapes(send: RecordedOp, recv: RecordedOp) -> bool:
    """Whether the shapes are known and differ, which says something where those of most messages of the link do not."""
    shapes = _shape_of(send), _shape_of(recv)
    return None not in shapes and shapes[0] != shapes[1]


def _bytes_text(send: Event, recv: Event) -> str:
    return f", {send.bytes:,} bytes for {recv.bytes:,}" if send.bytes != recv.bytes else ""


def _crossed(
    pairs: Sequence[tuple[RecordedOp, RecordedOp]],
) -> Iterator[tuple[tuple[RecordedOp, RecordedOp], tuple[RecordedOp, RecordedOp]]]:
    """Pairs next to each other in which each recv was meant for the other's send, by shape or by layer and chunk."""
    number = 0
    while number + 1 < len(pairs):
        one, other = pairs[number], pairs[number + 1]
        if any(_is_swap(one, other, of) for of in (_shape_of, _block_of)):
            yield one, other
            number += 1
        number += 1


def _is_swap(one: tuple[RecordedOp, RecordedOp], other: tuple[RecordedOp, RecordedOp], of: Any) -> bool:
    sent, received = (of(one[0]), of(other[0])), (of(one[1]), of(other[1]))
    return None not in sent and sent[0] != sent[1] and sent == received[::-1]


def _shape_of(op: RecordedOp) -> object:
    call = op.event.call
    return (call.shape, call.dtype) if call and call.shape else None


def _block_of(op: RecordedOp) -> object:
    event = op.event
    return None if event.layer is None and event.chunk is None else (event.layer, event.chunk)


def _left_out(ops: MatchedOps) -> Iterator[OpFinding]:
    """Messages that are missing in a row of them, each of which has then met the one before."""
    for rank, lonely, instead in left_out(ops):
        one = _finding(f"missing {instead.event.kind}", (lonely,), left_out_text(rank, lonely, instead))
        yield replace(one, ranks=(rank, lonely.event.rank))


def _never_received(ops: MatchedOps, over: set[int]) -> Iterator[OpFinding]:
    """Messages of which one end was never there, though both programs have ended: ranks that disagree on a count."""
    missing: defaultdict[object, list[RecordedOp]] = defaultdict(list)
    for rank in over:
        for op in ops.by_rank[rank]:
            is_message = op.event.kind in ("send", "recv") and op.event.call and ops.is_matchable(op)
            if is_message and op.event.peer in over and _is_missing(ops, op):
                missing[op.channel, op.side].append(op)
    for found in missing.values():
        first = found[0]
        event, count = first.event, len(found)
        verb, lacks = ("sent", "received") if event.kind == "send" else ("waited for", "sent")
        text = (
            f"rank {event.rank} has {verb} {first.number + count} messages of {full_text(event)}, and rank "
            f"{event.peer} has {lacks} {first.number}: they disagree on how many there are"
        )
        assert event.peer is not None
        one = _finding("never received" if event.kind == "send" else "never sent", found[:1], text)
        yield OpFinding(one.kind, (event.peer, event.rank), text, one.layer, one.chunk, one.line)


def _is_missing(ops: MatchedOps, op: RecordedOp) -> bool:
    assert op.event.peer is not None
    return ops.is_missing(op, op.event.peer, receives=op.event.kind == "send")


def _never_waited(ops: MatchedOps, over: set[int]) -> Iterator[OpFinding]:
    """Async ops for whose end nobody waited, by the line that issued them."""
    by_line: defaultdict[tuple[int, str, str], list[RecordedOp]] = defaultdict(list)
    for rank in over:
        for op in ops.by_rank[rank]:
            call = op.event.call
            if call and call.is_async and not (call.is_waited or call.is_followed):
                by_line[rank, call.place, op.event.kind].append(op)
    for found in by_line.values():
        event = found[0].event
        count = f"{len(found)} times, " if len(found) > 1 else ""
        meaning = (
            "its tensor may have been changed before it was sent"
            if event.kind == "send"
            else "its tensor may have been read before it was there"
        )
        text = f"rank {event.rank} never waited for {full_text(event)}, {count}so {meaning}"
        yield _finding("never waited", found[:1], text)


# -- collectives and groups


def _other_collectives(ops: MatchedOps) -> Iterator[OpFinding]:
    """Collectives that ended although the ranks called different ones, or with other tensors."""
    for parts in ops.collectives():
        ended = [op for op in parts.values() if op.event.end and op.event.call]
        for op in ended[1:]:
            if wrong := difference(op.event, ended[0].event):
                text = f"rank {op.event.rank} {wrong[1]}: it has ended all the same"
                yield _finding(wrong[0], (op, ended[0]), text)
                break


def _uneven_groups(ops: MatchedOps) -> Iterator[OpFinding]:
    """Groups that not all ranks made: `new_group` is called by all ranks of the world, in one order."""
    for parts in ops.collectives():
        some = next(iter(parts.values()))
        if some.event.kind not in MAKING:
            continue
        expected = set(ops.ranks_of(some))
        if absent := [
            rank
            for rank in sorted(expected - set(parts))
            if ops.by_rank.get(rank) and ops.is_missing(some, rank)
        ]:
            if not any(op.is_open for op in parts.values()):
                continue
            text = f"{ranks_text(parts)} called {full_text(some.event)}, and {ranks_text(absent)} did not"
            one = _finding("never joined", [*parts.values()], text)
            yield OpFinding(one.kind, (*absent, *one.ranks), text, line=one.line)


# -- slow ranks


def _slow_ranks(ops: MatchedOps) -> Iterator[OpFinding]:
    """The rank that comes last to almost all collectives, of all or of any minute, and the others wait."""
    came = sorted(
        (
            sorted((op.event.ready, rank) for rank, op in parts.items())
            for parts in ops.collectives()
            if len(parts) > 1 and next(iter(parts.values())).event.kind in COLLECTIVES
        ),
        key=_complete,
    )
    found = _slow_of(came, "collectives")
    if not found:
        found = next((those for some, what in _minutes(came) if (those := _slow_of(some, what))), [])
    yield from found


def _complete(came: Arrivals) -> int:
    """When the last rank came."""
    return came[-1][0]


def _minutes(came: Sequence[Arrivals]) -> Iterator[tuple[Sequence[Arrivals], str]]:
    """The collectives of each minute and what to call them, the last minute first; each ends at least half a minute
    before the one judged before it. `came`: in the order in which they were complete."""
    if not came:
        return
    until = last = _complete(came[-1])
    while True:
        first = bisect_left(came, until - SLOW_SPAN_NS, key=_complete)
        before = f"a minute that ended {seconds_text((last - until) / 1e9)} before the last one"
        some = came[first : bisect_right(came, until, key=_complete)]
        yield some, f"collectives of {before if until < last else 'the last minute'}"
        older = bisect_right(came, until - SLOW_SPAN_NS // 2, key=_complete)
        if not first or not older:
            return
        until = _complete(came[older - 1])


def _slow_of(came: Sequence[Arrivals], what: str) -> list[OpFinding]:
    """Of these collectives: for each, when its ranks came, in their order."""
    if not came:
        return []
    lags: defaultdict[int, list[float]] = defaultdict(list)
    for one in came:
        lags[one[-1][1]].append((one[-1][0] - one[-2][0]) / 1e9)
    spent = (max(one[-1][0] for one in came) - min(one[0][0] for one in came)) / 1e9
    found = []
    for rank, late in lags.items():
        is_often = len(late) >= SLOW_OPS and len(late) >= SLOW_SHARE * len(came)
        if is_often and median(late) >= SLOW_LAG_S and sum(late) >= SLOW_PART * spent:
            text = (
                f"rank {rank} is slow: it came last to {len(late)} of {len(came)} {what}, in the median "
                f"{seconds_text(median(late))} after the others"
            )
            found.append(OpFinding("slow rank", (rank,), text))
    return found

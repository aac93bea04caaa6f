"""A moment of a trace, against a replay of its events one by one; a stretch's totals, which add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as some

from dinfer.trace.events import Event
from dinfer.trace.export import TraceError
from dinfer.trace.moment import moment, moment_after
from dinfer.trace.notable import notable
from dinfer.trace.shares import shares, without_pauses
from dinfer.trace.stretch import ABOUT_STRETCH, stretch, stretch_between
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import transfers
from tests.support.traces import on_paper, recorded

TRACE = on_paper(6, 4, 3)
END = max(event.end for event in TRACE.events)
TIMES = some.integers(-1_000_000, END + 1_000_000)


@given(TIMES)
def test_a_moment_is_what_the_events_say(at: int) -> None:
    then = moment(TRACE, at)
    found = {(lane.rank, lane.lane): lane for lane in then.lanes}
    assert set(found) == {(event.rank, event.lane) for event in TRACE.events}
    for (rank, name), lane in found.items():
        mine = [event for event in TRACE.events if (event.rank, event.lane) == (rank, name)]
        under_way = [event for event in mine if event.ready <= at < event.end]
        assert lane.event == (under_way[0] if under_way else None)
        assert lane.last == max(
            (event for event in mine if event.end <= at), key=lambda e: e.end, default=None
        )
        expected = "" if not lane.event else _phase(lane.event, at)
        assert lane.phase == expected
    for link in then.links:
        mine_too = [one for one in transfers(TRACE) if one.link == (link.source, link.target)]
        arrived = [one for one in mine_too if one.end <= at]
        assert (link.arrived, link.bytes) == (len(arrived), sum(one.bytes for one in arrived))
        assert link.moving == sum(one.met <= at < one.end for one in mine_too)
        assert link.waiting == sum(one.offered <= at < one.met for one in mine_too)


def _phase(event: Event, at: int) -> str:
    if at < event.start:
        return "waits for its data"
    if at < event.met:
        return "waits for its peer"
    return "computes" if event.peer is None else "on the wire"


@given(TIMES, TIMES)
def test_totals_add_up_to_the_stretch(one: int, other: int) -> None:
    begin, end = sorted((one, other))
    found = stretch(TRACE, begin, end)
    assert [rank.rank for rank in found.ranks] == TRACE.ranks
    for rank in found.ranks:
        assert min(rank[1:]) >= 0
        assert sum(rank[1:]) == end - begin
    assert sum(found.parts.values()) == 3 * (end - begin)
    assert list(found.parts) == list(ABOUT_STRETCH)


@given(some.lists(TIMES, min_size=3, max_size=3).map(sorted))
def test_two_stretches_in_a_row_add_up_to_both(times: list[int]) -> None:
    first, second, whole = (stretch(TRACE, *ends) for ends in (times[:2], times[1:], times[::2]))
    for a, b, both in zip(first.ranks, second.ranks, whole.ranks, strict=True):
        assert [x + y for x, y in zip(a[1:], b[1:], strict=True)] == list(both[1:])
    for x, y, all_of_it in zip(first.links, second.links, whole.links, strict=True):
        assert [p + q for p, q in zip(x[2:], y[2:], strict=True)] == list(all_of_it[2:])


def test_the_totals_of_all_are_those_of_the_report() -> None:
    for trace in (TRACE, recorded()):
        found, known = stretch(trace, trace.began, max(event.end for event in trace.events)), shares(trace)
        for rank, share in zip(found.ranks, known.ranks, strict=True):
            assert rank.compute + rank.wire + rank.wait + rank.bubble == round(share.prefill_s * 1e9)
        assert sum(link.bytes for link in found.links) == sum(one.bytes for one in transfers(trace))


def test_a_stretch_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(TraceError, match="ends before it begins: give the earlier time first"):
        stretch(TRACE, 5, 4)


def test_a_slow_op_a_late_rank_and_a_bubble_are_notable() -> None:
    slow = next(event for event in TRACE.events if event.name == "layer c2 l3")
    late = next(event for event in TRACE.events if event.kind == "recv" and event.name == "recv kv c3 l1")
    send = next(
        e for e in TRACE.events if e.name == "send kv c3 l1" and (e.rank, e.peer) == (late.peer, late.rank)
    )
    later = late.met + 50_000_000
    changed = {slow: replace(slow, end=slow.end + 30_000_000)}
    changed[late] = replace(late, start=later, met=later, end=later + late.busy)
    changed[send] = replace(send, met=later, end=later + late.busy)
    found = notable(Trace.merge([[changed.get(event, event) for event in TRACE.events]]))
    kinds = {(one.kind, one.rank, one.layer, one.chunk) for one in found}
    assert ("slow op", slow.rank, 3, 2) in kinds
    assert ("late", late.rank, 1, 3) in kinds
    told = next(one for one in found if one.kind == "late")
    assert told.peer == late.peer
    assert f"rank {late.peer} waited" in told.text
    assert any(one.kind == "bubble" and one.rank == 2 and one.begin == TRACE.began for one in found)
    assert [one.begin for one in found] == sorted(one.begin for one in found)


def test_an_even_trace_has_no_slow_ops() -> None:
    assert not [one for one in notable(TRACE) if one.kind == "slow op"]


def test_seconds_count_from_the_first_op_without_pauses() -> None:
    second = 1_000_000_000
    later = [
        replace(
            event, **{name: getattr(event, name) + 7 * second for name in ("ready", "start", "met", "end")}
        )
        for event in TRACE.events
    ]
    paused = Trace.merge([[*TRACE.events, *later]])
    moving = without_pauses(paused)
    assert moving.events[-1].end < paused.events[-1].end  # there is a pause
    at = moving.began + (END - TRACE.began) * 3 // 2
    seconds = (at - moving.began) / second
    then = moment_after(paused, seconds)
    assert then == moment(moving, at)
    assert any(lane.event for lane in then.lanes)
    between = stretch_between(paused, 0.0, seconds)
    assert between == stretch(moving, moving.began, at)
    text = str(between)
    assert f"{between.parts['compute'] / 1e6:.3f}" in text
    assert "0→1" in str(then)
    assert "0→1" in text
    with pytest.raises(TraceError, match="give the earlier time first"):
        stretch_between(paused, 0.2, 0.1)


def test_a_frame_has_a_row_for_each_lane_or_rank_and_each_link() -> None:
    then, between = moment(TRACE, END // 2), stretch(TRACE, 0, END)
    for found, first, links in ((then, then.lanes, then.links), (between, between.ranks, between.links)):
        frame = found.to_frame()
        assert len(frame) == len(first) + len(links)
        assert frame["bytes"].sum() == sum(link.bytes for link in links)
        assert frame["source"].isna().sum() == len(first)

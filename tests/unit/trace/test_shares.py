"""What prefill went into, and pauses, with numbers worked by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.trace.events import Event
from dinfer.trace.intervals import Interval, length
from dinfer.trace.shares import ABOUT_PARTS, LinkShare, Share, pauses, percentages, shares, without_pauses
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import transfers
from tests.support.made_events import events, in_order
from tests.unit.trace.test_trace import S, compute, transfer

# Rank 0 computes from 0 to 4 and offers its block at 4; rank 1, which has waited for it since 0, comes back from
# computing at 6, so the block is on the wire from 6 to 9. Rank 0 computes from 7 to 8 meanwhile, rank 1 from 9 to 12.
RANK_0 = [compute(0, 0, 4), transfer(0, "send", 1, (4, 6, 9)), compute(0, 7, 8)]
RANK_1 = [compute(1, 2, 6), transfer(1, "recv", 0, (6, 6, 9)), compute(1, 9, 12)]
TRACE = Trace.merge([RANK_0, RANK_1])


def in_seconds(intervals: list[Interval]) -> list[Interval]:
    return [(start // S, end // S) for start, end in intervals]


def parts(share: Share) -> list[list[Interval]]:
    return [in_seconds(part) for part in share[1:]]


def test_each_rank_computes_moves_waits_or_has_nothing_to_do() -> None:
    zero, one = shares(TRACE).ranks
    assert parts(zero) == [[(0, 4), (7, 8)], [(6, 7), (8, 9)], [(4, 6)], [], [(7, 8)]]
    assert parts(one) == [[(2, 6), (9, 12)], [(6, 9)], [], [(0, 2)], []]
    assert (zero.prefill_s, zero.exposed_s, zero.communication_s) == (9.0, 4.0, 5.0)
    assert (one.prefill_s, one.exposed_s) == (12.0, 3.0)


def test_shares_of_all_ranks() -> None:
    found = shares(TRACE)
    assert found.exposed == pytest.approx(7 / 21)
    assert found.bubble == pytest.approx(2 / 21)
    assert found.exposed_communication == pytest.approx(7 / 8)


def test_a_link_is_told_by_its_exposed_time_and_who_was_late() -> None:
    (link,) = shares(TRACE).links
    # on the wire 2 of rank 0 and 3 of rank 1; 2 of rank 0 waiting for rank 1
    assert link == LinkShare(0, 1, wire_s=5.0, wait_s=2.0, late=1)
    assert link.exposed_s == 7.0


def test_a_recv_without_its_send_waits_for_its_peer() -> None:
    trace = Trace.merge([[transfer(1, "recv", 0, (2, 5, 6)), compute(1, 6, 7)]])
    (share,) = shares(trace).ranks
    assert parts(share) == [[(6, 7)], [(5, 6)], [(2, 5)], [], []]


def test_a_collective_is_communication() -> None:
    gather = Event(0, "main", "all_gather", 0, 0, 2 * S, 3 * S)
    (share,) = shares(Trace.merge([[gather, compute(0, 3, 4)]])).ranks
    assert parts(share) == [[(3, 4)], [(2, 3)], [(0, 2)], [], []]


def test_nothing_ran() -> None:
    found = shares(Trace(()))
    assert (found.ranks, found.links, found.exposed, found.exposed_communication) == ([], [], 0.0, 0.0)


def test_a_stopped_run_is_told_without_its_pauses() -> None:
    """Rank 0 is stopped from 4 to 60; nothing is allowed to begin meanwhile."""
    later = [compute(0, 60, 62), compute(1, 60, 61)]
    trace = Trace.merge([[compute(0, 0, 4), later[0]], [compute(1, 0, 3), later[1]]])
    assert in_seconds(pauses(trace)) == [(4, 60)]
    moved = without_pauses(trace)
    assert [(e.rank, e.met // S, e.end // S) for e in moved.events] == [
        (1, 0, 3),
        (0, 0, 4),
        (1, 4, 5),
        (0, 4, 6),
    ]
    zero, one = shares(trace).ranks
    assert parts(zero)[3] == []
    assert parts(one)[3] == [(3, 4)]  # rank 1 had nothing to do while rank 0 still computed
    assert [(s.prefill_s, s.exposed_s) for s in shares(moved).ranks] == [(6.0, 0.0), (5.0, 0.0)]


def test_a_run_that_nobody_stopped_is_itself() -> None:
    assert without_pauses(TRACE) is TRACE
    assert without_pauses(Trace(())).events == ()


@given(st.lists(events(ranks=3), max_size=12))
def test_the_parts_are_disjoint_and_no_longer_than_prefill(made: list[Event]) -> None:
    """Whatever a trace holds, in whatever order its times are."""
    trace = Trace.merge([in_order(made)])
    stopped = length(pauses(trace))
    for share in shares(trace).ranks:
        whole = sorted(part for kind in share[1:5] for part in kind)
        assert all(one[1] <= other[0] for one, other in pairwise(whole))
        assert length(whole) <= max(e.end for e in trace.events) - trace.began
        assert length(share.hidden) <= length(share.compute)
    assert len(without_pauses(trace).events) == len(trace.events)
    assert length(pauses(without_pauses(trace))) <= stopped
    assert all(one.waited >= 0 and one.wire >= 0 for one in transfers(trace))


def test_the_parts_of_prefill_add_up() -> None:
    found = shares(TRACE)
    expected = {"compute": 12, "exposed_wire": 5, "exposed_wait": 2, "bubble": 2}
    assert found.parts == pytest.approx(
        {name: part / sum(expected.values()) for name, part in expected.items()}
    )
    assert found.parts["exposed_wire"] + found.parts["exposed_wait"] == pytest.approx(found.exposed)
    assert found.parts["bubble"] == pytest.approx(found.bubble)
    assert set(found.parts) == set(ABOUT_PARTS)
    assert shares(Trace(())).parts == {}


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any))
def test_percentages_add_up_to_100_as_they_are_shown(parts: list[int]) -> None:
    found = [float(text.removesuffix(" %")) for text in percentages([part / sum(parts) for part in parts])]
    assert sum(found) == pytest.approx(100)
    assert all(
        abs(one - 100 * part / sum(parts)) < 0.1 + 1e-9 for one, part in zip(found, parts, strict=True)
    )

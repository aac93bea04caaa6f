"""Clocks of several hosts brought onto one: never further off than is said, and no arrow that runs backwards."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.trace.clocks import (
    DRIFT,
    HostClock,
    RankClock,
    clocks_text,
    error_between,
    on_one_clock,
    rank_clocks,
)
from dinfer.trace.events import Event, pairs
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import transfers

MS = 1_000_000
S = 1000 * MS


class Host:
    """A host whose clock began elsewhere and runs at another rate."""

    def __init__(self, ahead: int, rate: float) -> None:
        self.ahead, self.rate = ahead, rate

    def at(self, ours: int) -> int:
        """What its clock shows at a time of ours."""
        return self.ahead + round(ours * self.rate)

    def read(self, random: Random, until: int) -> HostClock:
        """A clock that was asked once a second, over ways that take 0.1 to 30 ms, each by chance."""
        clock = HostClock()
        for sent in range(0, until, S):
            there, back = (round(random.expovariate(1 / (2 * MS))) + MS // 10 for _ in range(2))
            received = self.at(sent + there)
            clock.note(sent, received, self.at(sent + there + MS), sent + there + back + MS)
        return clock


hosts = st.builds(
    Host, st.integers(-(10**15), 10**15), st.floats(1 - DRIFT, 1 + DRIFT, allow_subnormal=False)
)


@given(hosts, st.integers(0, 2**32), st.integers(1, 100), st.data())
def test_a_time_is_never_further_off_than_is_said(
    host: Host, seed: int, long: int, data: st.DataObject
) -> None:
    clock = host.read(Random(seed), long * S)
    first = data.draw(st.integers(0, (long + 5) * S))
    last = data.draw(st.integers(first, (long + 5) * S))
    error = clock.error(host.at(first), host.at(last))
    for ours in (first, (first + last) // 2, last):
        assert abs(clock.to_ours(host.at(ours)) - ours) <= error + 2  # of rounding


@given(hosts, hosts, st.integers(0, 2**32))
def test_no_arrow_runs_backwards_beyond_the_error(one: Host, other: Host, seed: int) -> None:
    random = Random(seed)
    clocks = [one.read(random, 30 * S), other.read(random, 30 * S)]
    sent, received = [], []
    for chunk in range(20):
        start = S + chunk * S
        met = start + random.randrange(MS)
        end = met + 1 + random.randrange(MS // 10)
        times = start, start, met, end
        there, here = ([host.at(time) for time in times] for host in (one, other))
        sent.append(Event(0, "send", "send", there[0], there[1], there[2], there[3], "kv", chunk, 0, 1, 1, 1))
        received.append(Event(1, "recv", "recv", here[0], here[1], here[2], here[3], "kv", chunk, 0, 0, 1, 1))
    by_rank, about = on_one_clock([sent, received], clocks)
    trace = Trace.merge(by_rank, **about)
    error = error_between(rank_clocks(trace.about), 0, 1)
    assert error is not None
    assert error < 70 * MS
    for send, recv in pairs(trace.events):
        assert send
        assert recv
        assert recv.end - send.met >= -error
        assert abs(recv.start - send.start) <= error  # they began together
    for events in by_rank:  # and what was in order on a rank still is
        seen = [time for event in events for time in (event.ready, event.start, event.met, event.end)]
        assert seen == sorted(seen)
    assert {one.late for one in transfers(trace)} == {None}  # which began last cannot be known


def test_ranks_of_one_host_share_its_clock_exactly() -> None:
    clock = Host(10**15, 1.0).read(Random(1), 3 * S)
    now = 10**15 + S
    events = [Event(rank, "compute", "layer", now, now, now, now) for rank in range(3)]
    by_rank, about = on_one_clock([[one] for one in events], [None, clock, clock])
    assert by_rank[0] == [events[0]]
    assert by_rank[1][0].end == by_rank[2][0].end
    clocks = rank_clocks(about)
    assert [one.clock for one in clocks] == [0, 1, 1]
    assert error_between(clocks, 1, 2) == 0
    assert (error_between(clocks, 0, 1) or 0) > 0
    assert "(2) were measured" in clocks_text(clocks)
    assert "right to" in str(Trace.merge(by_rank, **about))


def test_ranks_of_this_machine_are_left_as_they_are() -> None:
    events = [[Event(0, "compute", "layer", 1, 2, 3, 4)], [Event(1, "compute", "layer", 2, 3, 4, 5)]]
    assert on_one_clock(events, [None, None]) == (events, {})
    assert "clock" not in str(Trace.merge(events))


def test_a_clock_that_was_never_read_is_said() -> None:
    events = [[Event(rank, "compute", "layer", 1, 2, 3, 4)] for rank in range(2)]
    by_rank, about = on_one_clock(events, [None, HostClock()])
    assert by_rank == events
    assert "2 clocks, of which that of rank 1 was never read: times" in clocks_text(rank_clocks(about))
    several = [RankClock(0), RankClock(1, error_ns=None), RankClock(2, error_ns=None)]
    assert "3 clocks, of which those of ranks 1, 2 were never read: times" in clocks_text(several)
    assert error_between(rank_clocks(about), 0, 1) is None


def test_a_reading_whose_answer_came_before_its_question_counts_for_nothing() -> None:
    clock = HostClock()
    clock.note(100, 0, 50, 120)
    assert not clock.readings


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"clocks": 3},
        {"clocks": [3]},
        {"clocks": [{"clock": "a"}]},
        {"clocks": [{"clock": 0, "error_ns": "x"}]},
    ],
)
def test_of_a_file_that_says_something_else_nothing_is_known(about: dict[str, object]) -> None:
    assert rank_clocks(about) == []


def test_they_are_written_and_read() -> None:
    clocks = [RankClock(0), RankClock(1, 5, 7), RankClock(2, error_ns=None)]
    assert rank_clocks({"clocks": [one.as_dict() for one in clocks]}) == clocks

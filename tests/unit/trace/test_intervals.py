"""Intervals, compared with sets of seconds."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dinfer.trace.intervals import Interval, common, length, minus, union

INTERVALS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda ab: (min(ab), max(ab))), max_size=8
)


def seconds(intervals: list[Interval]) -> set[int]:
    return {second for start, end in intervals for second in range(start, end)}


@given(INTERVALS)
def test_union_is_the_same_time_in_disjoint_intervals(intervals: list[Interval]) -> None:
    united = union(intervals)
    assert seconds(united) == seconds(intervals)
    assert length(united) == len(seconds(intervals))
    assert all(one[1] < other[0] for one, other in pairwise(united))


@given(INTERVALS, INTERVALS)
def test_minus_is_what_lies_in_one_and_not_in_the_other(one: list[Interval], other: list[Interval]) -> None:
    left = minus(union(one), union(other))
    assert seconds(left) == seconds(one) - seconds(other)
    assert length(left) == len(seconds(left))


@given(INTERVALS, INTERVALS)
def test_common_is_what_lies_in_both(one: list[Interval], other: list[Interval]) -> None:
    assert seconds(common(union(one), union(other))) == seconds(one) & seconds(other)

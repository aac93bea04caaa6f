"""Intervals of time: disjoint (start, end) pairs in order, joined, cut and measured. Plain integers, no events."""

from bisect import bisect_right
from collections.abc import Iterable
from operator import itemgetter

Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """All of these intervals, as disjoint ones in order."""
    ordered = sorted(intervals)
    if not ordered:
        return []
    merged: list[Interval] = []
    begin, until = ordered[0]
    for start, end in ordered:
        if start > until:
            merged.append((begin, until))
            begin, until = start, end
        elif end > until:
            until = end
    merged.append((begin, until))
    return merged


def minus(intervals: list[Interval], removed: list[Interval]) -> list[Interval]:
    """The part of `intervals` outside `removed`; both disjoint and in order."""
    left: list[Interval] = []
    at = 0
    for start, end in intervals:
        while at < len(removed) and removed[at][0] < end:
            cut_start, cut_end = removed[at]
            if start < cut_start:
                left.append((start, cut_start))
            start = max(start, cut_end)
            if cut_end > end:
                break  # the next interval may lie in it too
            at += 1
        if start < end:
            left.append((start, end))
    return left


def common(intervals: list[Interval], others: list[Interval]) -> list[Interval]:
    """The time that lies in both; both disjoint and in order. Fast where one of them is short."""
    few, many = sorted((intervals, others), key=len)
    found = []
    for start, end in few:
        at = bisect_right(many, start, key=itemgetter(1))
        while at < len(many) and many[at][0] < end:
            both = max(start, many[at][0]), min(end, many[at][1])
            if both[0] < both[1]:
                found.append(both)
            at += 1
    return found


def length(intervals: Iterable[Interval]) -> int:
    """Their total length."""
    return sum(end - start for start, end in intervals)


def seconds(intervals: Iterable[Interval]) -> float:
    """The same in seconds, of intervals in nanoseconds."""
    return length(intervals) / 1e9

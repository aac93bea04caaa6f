"""What is notable of messages: those of a slow link, and not those that are larger than others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dinfer.plan.partition import Shape
from dinfer.plan.schedule import build
from dinfer.trace.notable import MOST, Notable, all_notable, notable
from dinfer.trace.simulated import Machine, paper_trace
from dinfer.trace.trace import Trace

LENGTHS = (320, 96, 96, 96, 96, 96, 96)
"""of chunks, as the planner makes them"""


def trace_of(lengths: tuple[int, ...], machine: Machine, ranks: int = 3) -> Trace:
    starts = tuple(2 * rank for rank in range(ranks))
    shape = Shape(2 * ranks, sum(lengths), max(lengths), starts, lengths)
    return paper_trace(build(shape, "pipelined", "pairwise"), machine)


def slow_messages(trace: Trace) -> list[Notable]:
    return [one for one in all_notable(trace) if one.kind == "slow message"]


@pytest.mark.parametrize("lengths", [LENGTHS, tuple(reversed(LENGTHS)), (320, 96, 64, 64, 48, 48, 16)])
def test_messages_of_longer_chunks_are_not_slow(lengths: tuple[int, ...]) -> None:
    for ranks in (2, 3):
        assert slow_messages(trace_of(lengths, Machine(), ranks)) == []


def test_of_a_slow_link_messages_of_every_size_are_slow() -> None:
    found = slow_messages(trace_of(LENGTHS, Machine(slow={(0, 1): 20})))
    assert {one.link for one in found} == {(0, 1)}
    assert {(one.what, one.chunk) for one in found} >= {("kv", chunk) for chunk in range(len(LENGTHS))}


def test_a_message_whose_size_no_other_has_is_judged_by_the_nearest_size() -> None:
    """Between two ranks only one link carries hidden states, and the first chunk is the only one of its length."""
    trace = trace_of(LENGTHS, Machine(), 2)
    changed = [
        replace(event, end=event.end + 60_000_000)
        if event.kind in ("send", "recv") and (event.what, event.chunk) == ("hidden", 0)
        else event
        for event in trace.events
    ]
    assert {(one.what, one.chunk) for one in slow_messages(Trace.merge([changed]))} == {("hidden", 0)}


def test_the_notable_are_the_longest_of_each_kind() -> None:
    trace = trace_of((16,) * 24, Machine(slow={(0, 1): 20}))
    all_of_them = all_notable(trace)
    assert len([one for one in all_of_them if one.kind == "slow message"]) > MOST
    for kind in {one.kind for one in all_of_them}:
        took = [one.took for one in all_of_them if one.kind == kind]
        assert sorted((one.took for one in notable(trace) if one.kind == kind), reverse=True) == took[:MOST]

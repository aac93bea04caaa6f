"""The usual time of each link on the wire, and its longest message."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest

from dinfer.trace.trace import Trace
from dinfer.trace.transfers import by_link, transfers
from dinfer.views.slowest import LEAST_NS, slowest
from tests.support.traces import on_paper

TRACE = on_paper(6, 4)


def test_the_slow_link_is_known_and_leads_to_its_longest_message() -> None:
    found = {(one.source, one.target): one for one in slowest(TRACE)}
    links = by_link(transfers(TRACE))
    assert list(found) == list(links)
    for link, one in found.items():
        assert one.usual == round(median(message.wire for message in links[link]))
        assert one.took == max(message.wire for message in links[link])
        assert one.rank == link[1]
        [event] = [
            event
            for event in TRACE.prefill(one.rank)
            if event.lane == one.lane and event.met <= one.at <= event.end and event.busy == one.took
        ]
        assert (event.name, event.peer, event.layer, event.chunk) == (one.text, link[0], one.layer, one.chunk)
    assert max(found, key=lambda link: found[link].usual) == (0, 1)


@pytest.mark.parametrize(("more", "slow"), [(2 * LEAST_NS, [(0, 2)]), (LEAST_NS // 2, [])])
def test_a_link_is_slow_that_takes_long_beside_others(more: int, slow: list[tuple[int, int]]) -> None:
    events = [
        replace(event, met=0, end=1000 + (more if (event.peer, event.rank) == (0, 2) else 0))
        if event.kind == "recv"
        else event
        for event in TRACE.events
    ]
    found = slowest(Trace.merge([events]))
    assert [(one.source, one.target) for one in found if one.is_slow] == slow


def test_a_trace_without_messages_has_no_links() -> None:
    assert slowest(Trace.merge([[event for event in TRACE.events if event.kind != "recv"]])) == []

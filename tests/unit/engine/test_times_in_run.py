"""What a layer takes among the other ops of a run, from the events of one rank."""

from __future__ import annotations

from typing import Any

import pytest

from dinfer.engine.measure import in_run_times
from dinfer.trace.events import Event

MS = 1_000_000


def layer(chunk: int, number: int, start: float, end: float) -> Event:
    ready, ended = round(start * MS), round(end * MS)
    return Event(0, "compute", "layer", ready, ready, ready, ended, chunk=chunk, layer=number, tokens=8)


def seconds(events: list[Event]) -> list[Any]:
    return [(one.position, one.tokens, pytest.approx(one.seconds)) for one in in_run_times(events, 8)]


def test_from_the_end_of_a_layer_to_the_end_of_the_next() -> None:
    """What lies between two ops of a lane counts; what the first layer of a chunk has waited for does not."""
    events = [
        layer(0, 3, 0, 9),
        layer(0, 4, 10, 14),
        layer(0, 5, 15, 19),
        layer(1, 3, 40, 44),
        layer(1, 4, 45, 50),
    ]
    assert seconds(events) == [(0, 8, 0.005), (8, 8, 0.006)]


def test_of_a_stage_of_one_layer_each_counts_by_itself() -> None:
    assert seconds([layer(0, 3, 0, 4), layer(1, 3, 10, 16)]) == [(0, 8, 0.004), (8, 8, 0.006)]

"""The run at a moment of its trace: its map against a replay of events, and at the end the run's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from dinfer.engine.board import Stand
from dinfer.run.state import Mark
from dinfer.trace.events import Event
from dinfer.trace.simulated import paper_trace
from dinfer.trace.trace import Trace
from dinfer.views.cells import (
    ARMED,
    COMPUTING,
    DIFFERS,
    NONFINITE,
    CellMap,
    held_states,
)
from dinfer.views.panel.scrubber import MOST_BINS, Scrubber, TimeQuestion, answer
from dinfer.views.recorded import RecordedRun
from dinfer.views.timeline import PARTS, Timeline
from tests.support.doubles import PaperRun, paper_plan
from tests.support.maps import unpacked
from tests.support.runs import wait_for
from tests.support.threads import session_on_threads

SIZE = (6, 4, 3)
PLAN = paper_plan(*SIZE)
TRACE = paper_trace(PLAN)
TIMELINE = Timeline(TRACE, SIZE)


@given(some.integers(-10, TIMELINE.span + 10))
def test_the_map_of_a_moment_is_that_of_a_replay(at: int) -> None:
    positions = [[0] * len(lanes) for lanes in PLAN.lanes]
    started = [[False] * len(lanes) for lanes in PLAN.lanes]
    numbers = [{lane.name: n for n, lane in enumerate(lanes)} for lanes in PLAN.lanes]
    for event in TRACE.events:
        lane = numbers[event.rank][event.lane]
        positions[event.rank][lane] += event.end <= at
        started[event.rank][lane] |= event.met <= at < event.end
    stands = [_stand(at, begun) for at, begun in zip(positions, started, strict=True)]
    assert np.array_equal(TIMELINE.states(at), CellMap(PLAN).states(stands))
    assert TIMELINE.done(at) == [sum(one) for one in positions]


def _stand(positions: list[int], started: list[bool]) -> Stand:
    return Stand(tuple(positions), tuple(started), tuple(positions))


def test_at_the_end_of_a_recorded_run_the_map_is_that_of_the_run() -> None:
    with session_on_threads(3, Path("demo")) as session:
        run = session.prefill("a b c d e f g h i j k l m n o p", chunk_size=4, paused=True)
        run.step("layer", 5)
        _same_as_run(run)
        run.step_back("layer", 3)
        run.step("wave")
        run.resume()
        run.wait(60)
        _same_as_run(run)


def _same_as_run(run: Any) -> None:
    shape = (run.plan.shape.layers, len(run.plan.shape.chunks), run.world_size)
    timeline = Timeline(run.trace, shape)
    assert np.array_equal(timeline.states(timeline.span), CellMap(run.plan).states(run.standing().stands))


def test_an_op_done_again_counts_as_undone_since_it_was_ready_again() -> None:
    def layer(index: int, ready: int, end: int) -> Event:
        return Event(0, "compute", "layer", ready, ready, ready, end, chunk=0, layer=index, index=index)

    timeline = Timeline(Trace.merge([[layer(0, 0, 10), layer(1, 10, 20), layer(0, 50, 60)]]), (2, 1, 1))
    held = {at: timeline.states(at)[:, 0, 0].tolist() for at in (5, 10, 30, 50, 60)}
    full = int(held_states(np.ones((1, 1, 1), bool))[0, 0, 0])
    assert held == {
        5: [COMPUTING, 0],
        10: [full, COMPUTING],
        30: [full, full],
        50: [COMPUTING, 0],
        60: [full, 0],
    }
    assert timeline.done(30) == [2]
    assert timeline.done(60) == [1]


@given(some.integers(0, TIMELINE.span - 1), some.integers(1, TIMELINE.span), some.integers(1, 50))
def test_each_bin_shows_the_part_that_takes_most_of_it(begin: int, long: int, bins: int) -> None:
    end = min(TIMELINE.span, begin + long)
    rows = TIMELINE.rank_rows(begin, end, bins)
    assert rows.shape == (3, bins)
    assert rows.max() < len(PARTS)
    [one] = TIMELINE.rank_rows(0, 1, 1)[:1].tolist()
    assert PARTS[one[0]] == "compute"  # rank 0 begins at once


class Page:
    """What a browser asks and hears."""

    def __init__(self, run: PaperRun) -> None:
        self.heard: list[tuple[dict[str, Any], list[bytes]]] = []
        self.scrubber = Scrubber(
            run, RecordedRun(run), lambda content, buffers: self.heard.append((content, buffers))
        )

    def ask(self, **message: Any) -> tuple[dict[str, Any], list[bytes]]:
        before = len(self.heard)
        self.scrubber.ask({"view": "me", "number": before, "bins": 10, **message})
        wait_for(lambda: len(self.heard) > before, "an answer")
        content, buffers = self.heard[-1]
        assert content["time"]["number"] == before
        return content["time"], buffers


@pytest.fixture
def run() -> PaperRun:
    made = PaperRun(PLAN)
    made.events, made.cut = list(TRACE.events), made.cuts.end
    return made


@pytest.fixture
def page(run: PaperRun) -> Iterator[Page]:
    made = Page(run)
    yield made
    made.scrubber.close()


def test_the_answer_has_strip_map_ranks_lanes_and_links(page: Page) -> None:
    at = TIMELINE.span // 2
    found, buffers = page.ask(at=at, rank=1)
    assert found["moment"]["at"] == at
    assert not found["moment"]["now"]
    assert len(buffers[found["strip"]]) == 10 * (3 + len(found["lanes"]))
    assert np.array_equal(unpacked(buffers[found["cells"]], SIZE), TIMELINE.states(at))
    assert [rank["done"] for rank in found["moment"]["ranks"]] == TIMELINE.done(at)
    assert any(lane["phase"] == "computes" for lane in found["moment"]["lanes"])
    again, buffers = page.ask(at=at, rank=1, have=found["key"])
    assert "strip" not in again
    assert len(buffers) == 1


def test_a_block_that_is_not_there_yet_has_no_mark_but_of_an_armed_fault(page: Page, run: PaperRun) -> None:
    run.marks = [
        Mark(0, 0, 0, "differs", "differs"),
        Mark(0, 0, 0, "nonfinite", "NaN"),
        Mark(1, 0, 0, "armed", "armed"),
    ]
    found, buffers = page.ask(at=1)
    early = unpacked(buffers[found["cells"]], SIZE)
    assert not (early & (DIFFERS | NONFINITE)).any()
    assert early[0, 0, 1] & ARMED
    found, buffers = page.ask(at=TIMELINE.span - 1)
    assert unpacked(buffers[found["cells"]], SIZE)[0, 0, 0] & (DIFFERS | NONFINITE) == DIFFERS | NONFINITE


def test_the_end_is_now(page: Page) -> None:
    for at in (None, TIMELINE.span, 10 * TIMELINE.span):
        found, buffers = page.ask(at=at)
        assert found["moment"]["now"]
        assert "cells" not in found
        assert len(buffers) == 1


def test_now_has_the_ops_that_have_not_ended(page: Page, run: PaperRun) -> None:
    run.cut = run.cuts.after_block(1, 1)
    run.started = tuple(tuple(int(lane.name == "compute") for lane in lanes) for lanes in run.plan.lanes)
    found, _ = page.ask()
    assert [(lane["rank"], lane["lane"]) for lane in found["moment"]["lanes"]] == [
        (n, "compute") for n in range(3)
    ]
    assert {lane["phase"] for lane in found["moment"]["lanes"]} == {"not ended"}


def test_shares_of_a_stretch_are_text_that_adds_up(page: Page) -> None:
    found, _ = page.ask(stretch=[TIMELINE.span // 2, TIMELINE.span // 4])
    total = found["stretch"]
    assert total["begin"] < total["end"]
    for row in total["rows"]:
        assert sum(round(10 * float(share[:-2])) for share in row["shares"]) == 1000


def test_a_run_that_moves_or_has_not_begun_says_so(page: Page, run: PaperRun) -> None:
    run.state = "running"
    assert page.ask()[0]["moving"]
    run.state, run.events, run.begun = "paused", [], 2
    fresh = Page(run)
    assert fresh.ask()[0]["span"] == 0
    fresh.scrubber.close()


@pytest.mark.parametrize(
    "message",
    [
        {"at": "soon", "begin": [], "bins": 1e9, "stretch": [1]},
        {"at": -5, "begin": 9e18, "end": -1, "bins": 0, "rank": 99, "stretch": [9e18, -9e18]},
        {"stretch": ["a", "b"], "rank": "x", "have": None},
    ],
)
def test_whatever_a_page_sends_is_answered(page: Page, message: dict[str, Any]) -> None:
    found, _ = page.ask(**message)
    assert found["span"] == TIMELINE.span
    assert found["bins"] <= MOST_BINS


def test_new_events_make_another_strip(page: Page, run: PaperRun) -> None:
    run.events = run.events[: len(run.events) // 2]
    first, _ = page.ask()
    run.events = list(TRACE.events)
    second, buffers = page.ask(have=first["key"])
    assert second["span"] > first["span"]
    assert buffers
    recorded = RecordedRun(run).now()
    assert recorded is not None
    assert answer(TimeQuestion.of({"at": 1}), recorded, PLAN)[0]["events"] == len(TRACE.events)


def test_pauses_between_steps_are_left_out(run: PaperRun) -> None:
    half = len(run.events) // 2
    later = max(event.end for event in run.events[:half]) + 1
    first = [event for event in run.events if event.end < later]
    pause = 3_000_000_000
    after = [moved_by(event, pause) for event in run.events]
    run.events = [*first, *after]
    found = RecordedRun(run).now()
    assert found is not None
    timeline = found.timeline
    assert timeline.paused > pause - later
    assert timeline.span < pause
    assert timeline.span + timeline.paused == max(event.end for event in after) - min(e.start for e in first)


def moved_by(event: Event, time: int) -> Event:
    times = {name: getattr(event, name) + time for name in ("ready", "start", "met", "end")}
    return replace(event, **times)

"""Live figures: bounded, drawn when a browser asks and there is something new, and without a way to upload."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from dinfer.run.prediction import figures_beside
from dinfer.run.state import State
from dinfer.trace.events import Event
from dinfer.trace.simulated import paper_trace
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import transfers
from dinfer.views.cells import CellMap
from dinfer.views.panel.communication import DRAW_S, FIGURES, LEAST, Communication, Ring
from dinfer.views.status import moment
from dinfer.views.still import still_html
from tests.support.doubles import PaperRun, paper_plan
from tests.support.runs import wait_for
from tests.support.traces import on_paper, recorded


class Browser:
    """What a browser would ask and hear."""

    def __init__(self, events: list[Event]) -> None:
        self.run = PaperRun(paper_plan())
        self.run.events = events
        self.heard: list[tuple[Any, Any]] = []
        self.live = Communication(
            self.run, lambda content, buffers=None: self.heard.append((content, buffers))
        )

    def figure(self, name: str, have: int = -1) -> dict[str, Any]:
        before = len(self.heard)
        self.live.ask({"view": "me", "name": name, "have": have, "dark": False})
        wait_for(lambda: len(self.heard) > before, "a figure")
        found: dict[str, Any] = self.heard[-1][0]["figure"]
        return found


@pytest.fixture
def browser() -> Iterator[Browser]:
    made = Browser(list(on_paper(4, 3, 3).events))
    yield made
    made.live.close()


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_is_that_of_the_trace(browser: Browser, name: str) -> None:
    found = browser.figure(name)
    assert json.loads(found["json"]) == json.loads(FIGURES[name](on_paper(4, 3, 3), dark=False).to_json())
    assert found["caption"] == f"{len(browser.run.events):,} events of prefill"
    assert found["events"] == len(browser.run.events)


def test_before_anything_has_run_that_is_said() -> None:
    browser = Browser([])
    found = browser.figure("latency")
    assert "json" not in found
    assert found["caption"].startswith("nothing has run yet")
    browser.live.close()


def test_the_next_figure_comes_once_there_are_new_events(browser: Browser) -> None:
    seen = browser.figure("latency")["seen"]
    browser.live.ask({"view": "me", "name": "latency", "have": seen, "dark": False})
    browser.live.touch()
    browser.run.events = [*browser.run.events, *on_paper(4, 3, 3).events]
    browser.live.touch()
    wait_for(lambda: len(browser.heard) == 2, "one more figure")
    assert browser.heard[-1][0]["figure"]["seen"] == 2 * seen


def test_the_ring_keeps_the_newest_and_no_more() -> None:
    run = PaperRun(paper_plan())
    ring = Ring(run, most=50)
    events = sorted(on_paper(4, 3, 3).events, key=lambda event: event.end)
    for end in range(10, len(events) + 1, 10):
        run.events = events[:end]
        ring.read()
    assert len(ring.trace().events) == 50
    assert ring.caption.startswith(
        f"{len(events):,} events of prefill; drawn from the newest 50, times count"
    )
    assert ring.seen == ring.count == len(run.events)
    assert min(event.end for event in ring.trace().events) >= events[ring.seen - 50].end


def test_decode_and_checks_do_not_push_transfers_out() -> None:
    run = PaperRun(paper_plan())
    run.events = list(recorded().events)
    ring = Ring(run)
    ring.read()
    assert {event.kind for event in ring.trace().events}.isdisjoint({"decode", "check", "corrupt"})
    assert len(ring.trace().events) == len(list(recorded().prefill()))


def test_a_run_that_begins_anew_begins_anew_here(monkeypatch: pytest.MonkeyPatch) -> None:
    run = PaperRun(paper_plan())
    run.events = list(on_paper(4, 3, 3).events)
    ring = Ring(run)
    ring.read()
    few = run.events[:7]
    monkeypatch.setattr(run, "events_since", lambda _: (few, [1, 7]))
    seen = ring.seen
    ring.read()
    assert len(ring.trace().events) == ring.count == 7
    assert ring.caption == "7 events of prefill"
    assert ring.seen > seen  # so that browsers are sent it


def test_events_on_their_way_are_counted_until_they_have_arrived() -> None:
    """Ops are known to be done before their events arrive; those that never will are not waited for."""
    run = PaperRun(paper_plan())
    run.resume()
    events = sorted(paper_trace(run.plan).events, key=lambda event: event.end)
    ring = Ring(run)
    for arrived in (0, 20, len(events) - 1):
        run.events, run.state = events[:arrived], "running"
        ring.read()
        assert (ring.ops, ring.behind) == (arrived, len(events) - arrived)
        assert ring.caption == f"catching up: {arrived:,} of {len(events):,} events of prefill"
        seen = ring.seen
    run.state = "failed"
    ring.read()
    assert "catching up" not in ring.caption
    assert f"{len(events) - 1:,} of {len(events):,} events" in ring.caption
    assert ring.seen > seen
    run.events, run.state = events, "done"
    ring.read()
    assert (ring.behind, ring.caption) == (0, f"{len(events):,} events of prefill")


def test_ranks_that_have_not_reported_are_shown_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a run whose session has recovered by starting a rank again, which has no lanes yet."""
    run = PaperRun(paper_plan())
    run.resume()
    unknown = run.standing()._replace(stands=(), state=State.LOST)
    shown, drawn, _ = moment(run.plan, CellMap(run.plan), unknown)
    assert {rank["state"] for rank in shown["ranks"]} == {"not known"}
    assert {(rank["done"], rank["where"]) for rank in shown["ranks"]} == {
        (0, "has not reported its position yet")
    }
    assert drawn == moment(run.plan, CellMap(run.plan), PaperRun(paper_plan()).standing())[1]
    assert "has not reported" in still_html(run.plan, unknown, run.chunk_labels())
    monkeypatch.setattr(run, "standing", lambda: unknown)
    ring = Ring(run)
    ring.read()
    assert (ring.ops, ring.behind) == (0, 0)


def test_going_back_leaves_nothing_to_wait_for() -> None:
    run = PaperRun(paper_plan())
    run.resume()
    run.events = list(paper_trace(run.plan).events)
    run.step_back("chunk")
    ring = Ring(run)
    ring.read()
    assert (ring.behind, ring.count) == (0, len(run.events))


def test_plotly_is_sent_once_it_is_asked_for_and_has_nowhere_to_upload(browser: Browser) -> None:
    browser.live.script({"view": "me"})
    content, buffers = browser.heard[-1]
    assert content["config"]["showSendToCloud"] is False
    assert content["config"]["plotlyServerURL"] == ""
    assert len(buffers[0]) > 1_000_000


def test_a_figure_that_cannot_be_drawn_is_said_so(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such colour")

    monkeypatch.setitem(FIGURES, "latency", fail)
    assert browser.figure("latency")["error"] == "ValueError: no such colour"


def test_figures_that_there_are_not_are_not_drawn(browser: Browser) -> None:
    browser.live.ask({"view": "me", "name": "horoscope", "have": -1})
    assert browser.figure("matrix")["name"] == "matrix"
    assert len(browser.heard) == 1


def test_time_of_which_nothing_is_known_is_no_bubble() -> None:
    """In a long run, what a ring holds is its last moments; a recv that was posted at the start ends among them."""
    run = PaperRun(paper_plan())
    events = sorted(on_paper(8, 40, 3).events, key=lambda event: event.end)
    run.events = events
    ring = Ring(run, most=300)
    ring.read()
    trace = ring.trace()
    kept = events[-300:]
    assert [event.end for event in trace.events] == [event.end for event in kept]
    assert trace.began >= min(event.met for event in kept)
    longest = max((event.end - trace.began) for event in kept)
    assert longest < (kept[-1].end - events[0].ready) / 2
    both = list(zip(transfers(trace), transfers(Trace.merge([kept])), strict=True))
    assert all((one.link, one.wire, one.end) == (other.link, other.wire, other.end) for one, other in both)
    known = [(one, other) for one, other in both if other.offered >= trace.began]
    assert len(known) > len(both) / 2
    assert all(one.waited == other.waited for one, other in known)
    # of which only the recv is among the events, and since when it had waited is not
    assert all(one.offered >= trace.began for one, _ in both)


def test_where_drawing_is_slow_a_run_that_moves_is_drawn_from_fewer_events_and_at_its_end_from_all() -> None:
    run = PaperRun(paper_plan())
    run.events = sorted(on_paper(12, 40, 3).events, key=lambda event: event.end)
    run.state = "running"
    ring = Ring(run)
    ring.read()
    assert len(ring.trace().events) == len(run.events) > LEAST
    ring.drew(100 * DRAW_S)
    ring.read()
    assert len(ring.trace().events) == LEAST
    assert f"drawn from the newest {LEAST:,}" in ring.caption
    ring.drew(DRAW_S / 2)
    ring.read()
    assert len(ring.trace().events) > LEAST
    ring.drew(100 * DRAW_S)
    seen, run.state = ring.seen, "done"
    ring.read()
    assert len(ring.trace().events) == len(run.events)
    assert ring.caption == f"{len(run.events):,} events of prefill"
    assert ring.seen > seen


def predicting(events: list[Event], predicted: dict[str, float]) -> Browser:
    """A browser of a run of which the planner has predicted something, as a saved one has it."""
    made = Browser(events)
    made.live.close()
    made.run = PaperRun(paper_plan(4, 3, 3))
    made.run.events, made.run.cut, made.run.state = events, made.run.cuts.end, State.DONE
    made.run.predicted = predicted  # type: ignore[attr-defined]
    made.live = Communication(made.run, lambda content, buffers=None: made.heard.append((content, buffers)))
    return made


def test_predicted_stands_beside_measured_by_rank_and_link() -> None:
    trace = on_paper(4, 3, 3)
    measured = dict(row[:2] for row in as_measured(trace))
    wanted = {name: 2 * seconds for name, seconds in measured.items()}
    browser = predicting(list(trace.events), wanted)
    assert browser.live.figures == [*FIGURES, "predicted"]
    bars = json.loads(browser.figure("predicted")["json"])["data"]
    assert [one["name"] for one in bars] == ["predicted", "measured"]
    assert bars[0]["y"] == bars[1]["y"] == list(wanted)
    assert {"prefill", "rank 0 computes", "link 0→1"} <= set(wanted)
    assert bars[0]["text"] == ["+100%"] * len(wanted)
    browser.live.close()


def test_of_a_part_of_a_run_no_prediction_is_called_wrong() -> None:
    """Predicted are the seconds of the whole prefill, also while a quarter of it has run."""
    trace = on_paper(4, 3, 3)
    wanted = dict(row[:2] for row in as_measured(trace))
    browser = predicting(list(trace.events[: len(trace.events) // 4]), wanted)
    browser.run.cut, browser.run.state = browser.run.cuts.start, State.PAUSED
    found = browser.figure("predicted")
    assert found["caption"].endswith("; predicted: of the whole prefill; measured: so far")
    predicted, measured = json.loads(found["json"])["data"]
    assert measured["name"] == "measured so far"
    assert {*predicted["text"], *measured["text"]} == {""}
    assert "off" not in predicted["hovertemplate"] + measured["hovertemplate"]
    browser.live.close()


def test_of_a_run_of_which_a_part_ran_twice_it_is_said() -> None:
    trace = on_paper(4, 3, 3)
    wanted = dict(row[:2] for row in as_measured(trace))
    browser = predicting([*trace.events, trace.events[0]], wanted)
    found = browser.figure("predicted")
    assert found["caption"].endswith("; ops that ran again after a step back are measured each time")
    assert set(json.loads(found["json"])["data"][0]["text"]) == {""}
    browser.live.close()


def test_without_a_prediction_there_is_no_such_figure(browser: Browser) -> None:
    assert browser.live.figures == list(FIGURES)


def test_while_a_long_run_moves_its_prediction_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest events, of which the others are drawn, do not tell what a rank has computed in all."""
    events = list(on_paper(4, 3, 3).events)
    browser = predicting(events, {"prefill": 1.0})
    monkeypatch.setattr(browser.live, "_ring", Ring(browser.run, 10))
    browser.run.state = State.RUNNING
    found = browser.figure("predicted")
    assert "json" not in found
    assert found["caption"].endswith("predicted beside measured once the run stands")
    assert found["seen"] == -1
    browser.run.state = State.DONE
    assert "json" in browser.figure("predicted")
    browser.live.close()


def as_measured(trace: Trace) -> list[tuple[str, float, float]]:
    """Each figure, measured twice."""
    names = ["prefill", *(f"rank {rank} computes" for rank in range(3))]
    names += [f"link {a}→{b}" for a, b in sorted({(one.source, one.target) for one in transfers(trace)})]
    return [(name, found, found) for name, _, found in figures_beside(dict.fromkeys(names, 0.0), trace)]

"""A panel on a session's run at rest: nothing is told, painted or started, and yet whatever changes is followed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.views.bins import packed
from dinfer.views.cells import CellMap
from dinfer.views.panel.panel import Panel
from tests.support.expected import panel_threads
from tests.support.runs import wait_for

LOOKS = 10


MODEL = "demo"


class Counted:
    """A panel on a run, with counts of what it does."""

    def __init__(self, run: Run, patch: pytest.MonkeyPatch) -> None:
        self.run, self.looks, self.paints, self.told = run, 0, 0, 0
        self.started = list[str]()
        start, look, standing = threading.Thread.start, run.look, run.standing

        def started(thread: threading.Thread) -> None:
            self.started += [thread.name] * ("panel" in thread.name)
            start(thread)

        def looked() -> None:
            look()
            self.looks += 1

        def painted() -> Any:
            self.paints += "panel painter" in threading.current_thread().name
            return standing()

        patch.setattr(threading.Thread, "start", started)
        patch.setattr(run, "look", looked)
        patch.setattr(run, "standing", painted)
        self.panel = Panel(run)
        run.on_change(self._tell)

    def _tell(self) -> None:
        self.told += 1

    def counts(self) -> tuple[int, int, int]:
        return self.told, self.paints, len(self.started)

    def rest(self) -> None:
        """Wait until the session has looked often without anything being told."""

        def is_quiet() -> bool:
            before, looks = self.counts(), self.looks
            wait_for(lambda: self.looks >= looks + LOOKS, "the session looks")
            return self.counts() == before and not panel_threads()

        wait_for(is_quiet, "nothing is told any more")

    def follows(self) -> bool:
        states = CellMap(self.run.plan).states(self.run.standing().stands)
        return bool(self.panel.cells == packed(states))


@pytest.fixture
def counted(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    found = Counted(session.prefill(list(range(1, 31)), chunk_size=10, paused=True), monkeypatch)
    yield found
    found.panel.close()


def test_at_rest_nothing_is_painted_and_a_step_is_followed(counted: Counted) -> None:
    counted.rest()
    before, looks, cells = counted.counts(), counted.looks, counted.panel.cells
    wait_for(lambda: counted.looks >= looks + LOOKS, "the session looks")
    assert counted.counts() == before
    counted.run.step("chunk")
    wait_for(lambda: counted.panel.cells != cells and counted.follows(), "the map follows the step")
    assert counted.paints > before[1]
    counted.rest()


def test_what_moves_without_an_action_is_followed_to_its_end(counted: Counted) -> None:
    counted.run.resume()
    wait_for(lambda: counted.panel.shown["state"] == "done" and counted.follows(), "the map follows")
    counted.rest()
    assert counted.panel.shown["state"] == "done"


def test_breakpoints_and_faults_that_a_cell_ends_are_gone_from_the_panel(counted: Counted) -> None:
    run, panel = counted.run, counted.panel
    stop = run.break_at(layer=2, chunk=1)
    run.inject("bitflip", layer=4, chunk=2)
    wait_for(lambda: panel.shown["breakpoints"] and panel.shown["faults"], "both are shown")
    counted.rest()
    run.breakpoints.remove(stop.number)
    wait_for(lambda: panel.shown["breakpoints"] == [], "the breakpoint is gone")
    run.faults.clear()
    wait_for(lambda: panel.shown["faults"] == [], "the fault is gone")


def test_news_of_events_alone_is_told(session: Session, counted: Counted) -> None:
    """Figures are drawn of events, which may come after the positions that go with them."""
    counted.run.step("chunk")
    counted.rest()
    told = counted.told
    with session.ranks.changed:
        events = session.ranks.ranks[0].events
        events.append(events[-1])
    wait_for(lambda: counted.told > told, "it is told")

"""The banner over a real session's run: a hang with its remedy, the end of it, and nothing of it over a fresh run."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from dinfer.run.run import Run
from dinfer.run.state import RECOVER
from dinfer.session.session import Session
from dinfer.views.panel.panel import Panel
from tests.browser.conftest import Shot
from tests.support.fixtures import fresh_session
from tests.support.panel_pages import SHOW
from tests.support.runs import DEADLINE_S
from tests.support.twin import prompt

pytestmark = pytest.mark.browser

IDS = prompt(10)
session = fresh_session


class LivePanel:
    """The panel of a run on a bare page: what the kernel's side sends is shown, what is pressed reaches it."""

    def __init__(self, page: Page, run: Run) -> None:
        self.page, self.panel = page, Panel(run)
        self._shown: object = None
        page.set_content("<!doctype html><div id=place></div>")
        traits = {**self._traits(), "board": self.panel.board, "selected": None}
        page.evaluate(SHOW, {"script": Panel._esm, "css": Panel._css, "traits": traits})
        self.root = page.locator(".dinfer-panel")
        self.banner = self.root.locator(".dinfer-banner")
        self.mend = self.banner.locator("[data-do=mend]")

    def follow(self, until: Callable[[], bool]) -> None:
        """Pass on what either side sends until that is so, and then once more."""
        deadline, is_so = time.monotonic() + DEADLINE_S, False
        while not is_so:
            assert time.monotonic() < deadline, self.root.inner_text()
            is_so = until()
            self._pass_on()

    def _pass_on(self) -> None:
        for message in self.page.evaluate("() => window.sent.splice(0)"):
            self.panel._on_message(None, message, None)
        traits = self._traits()
        if traits != self._shown:
            self._shown = traits
            self.page.evaluate(
                """({ cells, marks, shown }) => {
                    const bytes = Uint8Array.from(atob(cells), (letter) => letter.charCodeAt(0));
                    window.model.set("cells", new DataView(bytes.buffer));
                    window.model.set("marks", marks);
                    window.model.set("shown", shown);
                }""",
                traits,
            )
        self.page.wait_for_timeout(20)

    def shows(self, state: str) -> bool:
        return self.root.get_attribute("data-state") == state

    def _traits(self) -> dict[str, Any]:
        cells = base64.b64encode(self.panel.cells).decode()
        return {"cells": cells, "marks": self.panel.marks, "shown": self.panel.shown}


@pytest.fixture
def live(page: Page) -> Iterator[Callable[[Run], LivePanel]]:
    """Makes such panels."""
    made = list[LivePanel]()

    def shown(run: Run) -> LivePanel:
        made.append(LivePanel(page, run))
        return made[-1]

    yield shown
    for one in made:
        one.panel.close()


Live = Callable[[Run], LivePanel]


def test_a_hang_has_a_remedy_that_is_a_button(session: Session, live: Live, shot: Shot) -> None:
    run = session.prefill(IDS, chunk_size=4, schedule="batched", unsafe=True)
    panel = live(run)
    panel.follow(lambda: panel.shows("hung"))
    expect(panel.banner).to_have_attribute("data-severity", "error")
    expect(panel.banner).to_contain_text("✖ hung")
    expect(panel.banner).to_contain_text("deadlock: rank 0 waits for rank 1")
    expect(panel.banner.locator("code")).to_have_text(RECOVER)
    expect(panel.root.locator(".dinfer-state")).to_have_text("✖ hung")
    shot("banner-hung-light")
    panel.page.emulate_media(color_scheme="dark")
    shot("banner-hung-dark")
    panel.page.emulate_media(color_scheme="light")
    panel.mend.click()
    panel.follow(lambda: panel.shows("paused"))
    expect(panel.banner).to_be_hidden()
    expect(panel.root.locator(".dinfer-call code").last).to_have_text(RECOVER)
    shot("banner-mended-light")


def test_a_hang_that_ends_by_itself_takes_the_banner_with_it(
    session: Session, live: Live, door: threading.Event
) -> None:
    run = session.prefill(IDS, chunk_size=4)
    panel = live(run)
    panel.follow(lambda: panel.shows("hung"))
    expect(panel.banner).to_contain_text("stuck in Python")
    expect(panel.mend).to_be_visible()
    door.set()
    panel.follow(lambda: panel.shows("done"))
    expect(panel.banner).to_be_hidden()


def test_nothing_of_an_old_trouble_is_over_a_fresh_run(session: Session, live: Live) -> None:
    """Neither the verdict nor the error of a button, nor an answer, wherever the run was mended."""
    run = session.prefill(IDS, chunk_size=4, schedule="batched", unsafe=True)
    panel = live(run)
    panel.follow(lambda: panel.shows("hung"))
    panel.root.locator('[data-do="why"]').click()
    panel.follow(lambda: bool(panel.panel.shown["answer"]))
    expect(panel.banner.locator(".dinfer-line")).to_have_count(2)
    panel.root.locator('[data-do="step:layer"]').click()
    panel.follow(lambda: bool(panel.panel.shown["error"]))
    session.recover()
    run.restart()
    panel.follow(lambda: panel.shows("paused"))
    expect(panel.banner).to_be_hidden()
    fresh = session.prefill(IDS, chunk_size=4, paused=True)
    over, new = panel, live(fresh)
    new.follow(lambda: new.shows("paused"))
    expect(new.banner).to_be_hidden()
    assert over.panel.shown["state_severity"] == "note"


def test_each_line_has_its_own_level(session: Session, live: Live, shot: Shot) -> None:
    """That nothing is there yet is no error, and a difference between ranks is one."""
    run = session.prefill(IDS, chunk_size=4, paused=True)
    panel = live(run)
    panel.root.locator('[data-do="diff"]').click()
    panel.follow(lambda: bool(panel.panel.shown["error"]))
    expect(panel.banner).to_have_attribute("data-severity", "note")
    run.resume()
    run.wait()
    run.inject("bitflip", rank=2, layer=1, chunk=0)
    panel.root.locator('[data-do="diff"]').click()
    panel.follow(lambda: "differs" in panel.panel.shown["answer"])
    expect(panel.banner).to_have_attribute("data-severity", "error")
    expect(panel.root.locator(".dinfer-faults")).to_have_attribute("data-severity", "warning")
    shot("banner-differs-light")
    run.faults.clear()

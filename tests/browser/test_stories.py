"""Three stories, as a new user lives them: a hang, a wrong answer, a slow link, each from its symptom to its cause on
the desk of `session.debugger()`, with the mouse alone and in few clicks. Each step leaves a picture among the
screenshots; DINFER_STORIES_LOOK, for example `900 dark`, is how wide the window is, and its colours.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from dinfer.session.session import Session
from tests.support.runs import DEADLINE_S

pytestmark = pytest.mark.browser

PROMPT = "The code of Lima is 471. The code of Oslo is 306. What is the code of Lima? The code of Lima is"
MOST_CLICKS = 8
MS = 20
COUNT = """
window.used = { clicks: 0, keys: 0 };
addEventListener("pointerdown", () => { window.used.clicks += 1; }, true);
addEventListener("keydown", () => { window.used.keys += 1; }, true);
"""
WITHIN = "document.documentElement.scrollWidth <= window.innerWidth"


class Story:
    """The desk in a browser: `click` clicks, and takes a picture of what came of it."""

    def __init__(self, name: str, page: Page, folder: Path) -> None:
        self.name, self.page, self.folder, self.clicks = name, page, folder, 0
        self.panel = page.locator(".dinfer-panel")

    def click(
        self, target: Locator, shows: Locator, text: str, at: tuple[float, float] | None = None
    ) -> None:
        """Click it, in its middle or `at` a place of it: the page then shows that text there."""
        target.click(position={"x": at[0], "y": at[1]} if at else None)
        self.clicks += 1
        expect(shows).to_contain_text(text)
        self.shot()

    def shot(self) -> None:
        """Keep a picture of the page, whose number is that of the clicks before it."""
        self.page.mouse.move(2, 2)  # at rest on nothing
        self.page.wait_for_function(
            "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(true))))"
        )
        assert self.page.evaluate(WITHIN), "nothing is wider than the window"
        self.page.screenshot(path=self.folder / f"{self.name}-{self.clicks}.png", full_page=True)

    def tab(self, name: str) -> Locator:
        return self.panel.get_by_role("tab", name=name)

    def button(self, name: str) -> Locator:
        return self.panel.get_by_role("button", name=name, exact=True)

    def cell(self, layer: int, chunk: int) -> tuple[float, float]:
        """The middle of a block's cell on the map."""
        at: dict[str, float] = self.page.evaluate(
            "JSON.parse(document.querySelector('.dinfer-map canvas[data-geometry]').dataset.geometry)"
        )
        return at["left"] + (chunk + 0.5) * at["across"], at["top"] + (layer + 0.5) * at["down"]

    def end(self, clicks: int) -> None:
        """It took that many clicks, as the page has counted them, and no key."""
        assert self.page.evaluate("window.used") == {"clicks": clicks, "keys": 0}
        assert self.clicks == clicks <= MOST_CLICKS


@pytest.fixture
def page(page: Page) -> Page:
    """A page that counts what a person does."""
    wide, _, scheme = (os.environ.get("DINFER_STORIES_LOOK") or "1280 light").partition(" ")
    page.set_viewport_size({"width": int(wide), "height": 800})
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.add_init_script(COUNT)
    return page


class Desk:
    """`session.debugger()` in a tab of its own, with a story's name."""

    def __init__(self, name: str, session: Session, page: Page, folder: Path) -> None:
        self._desk: Any = session.debugger(detached=True)
        page.goto(self._desk.address)
        page.wait_for_selector(".dinfer-map canvas[data-geometry]")
        self.story = Story(name, page, folder)

    def __enter__(self) -> Story:
        return self.story

    def __exit__(self, *_: object) -> None:
        self._desk.close()


def test_a_hang(session: Session, page: Page, screenshots: Path) -> None:
    session.prefill(PROMPT, chunk_size=8, schedule="batched", unsafe=True, paused=True)
    with Desk("hang", session, page, screenshots) as story:
        story.shot()
        banner, why, block = (story.panel.locator(f".dinfer-{name}") for name in ("banner", "why", "block"))
        # The symptom: it does not go on. Who waits for whom is drawn beside it, and in which line of code.
        story.click(story.button("▶ play"), banner, "deadlock: rank 0 waits for rank 1 to take block c0 l0")
        expect(why.locator("svg")).to_contain_text("send kv c0 l0 -> 1")
        expect(why.locator("svg path[marker-end]")).to_have_count(3)
        expect(why.locator("details[data-rank='0'][open] li")).to_contain_text(["ops.py", "lanes.py"])
        expect(why.locator("details[data-rank='0'] a").first).to_be_visible()
        story.shot()
        # Is it so? The block is on its sender alone.
        story.click(
            story.panel.get_by_label("map of blocks"),
            block,
            "held by rank 0; ranks 1, 2 wait for it",
            story.cell(0, 0),
        )
        # The remedy is a button.
        expect(banner).to_contain_text("session.recover(); run.restart()")
        story.click(story.button("recover and restart"), story.panel.locator(".dinfer-state"), "paused")
        expect(why).to_be_hidden()
        story.end(3)


def test_a_wrong_answer(session: Session, page: Page, screenshots: Path) -> None:
    good = session.prefill(PROMPT, chunk_size=8, keep=True)
    good.decode(4)
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.inject("stale", rank=0, layer=1, chunk=1, tensor="V", where="memory")
    run.decode(4)
    with Desk("wrong", session, page, screenshots) as story:
        # The symptom: it was 471.
        expect(story.panel.locator(".dinfer-text")).to_contain_text("461")
        story.shot()
        sides, block = story.panel.locator(".dinfer-sides"), story.panel.locator(".dinfer-block")
        verdict, said = story.panel.locator(".dinfer-verdict"), story.panel.locator(".dinfer-said-tool")
        story.click(story.tab("runs"), story.panel.locator(".dinfer-runs"), f"{run.name} (here)")
        story.click(story.button("compare"), sides, "KV differs, first at block c1 l1")
        expect(sides.locator("tr.dinfer-differs").first).to_contain_text("471")
        story.click(story.button("show c1 l1"), block, "block c1 l1 · tokens 8–15 · owner rank 0 · selected")
        story.click(story.tab("KV"), verdict, "V: stale: rows 8–15 hold rows 0–7 of the chunk before")
        expect(story.panel.locator("[data-field=layer]")).to_have_value("1")
        # Its values: those of chunk 1 are those of chunk 0, on all ranks.
        story.click(
            story.button("difference ▶"), said, "computed there in chunk 1, changed afterwards in its memory"
        )
        expect(story.panel.locator("[data-field=tensor]")).to_have_value("V")
        expect(story.panel.locator("[data-show=a]")).to_have_class("dinfer-on")
        expect(story.panel.locator(".dinfer-spot")).to_contain_text("A, rank 0")
        story.shot()
        story.end(5)


def test_a_slow_link(session: Session, page: Page, screenshots: Path) -> None:
    session.prefill(PROMPT, chunk_size=8).wait(DEADLINE_S)
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.inject("slow link", source=0, target=2, ms=MS)
    run.resume()
    run.wait(DEADLINE_S)
    with Desk("slow", session, page, screenshots) as story:
        story.shot()
        # The symptom: it takes longer than the run before.
        figure, panel = story.panel.locator(".dinfer-figure"), story.panel
        story.click(story.tab("runs"), panel.locator(".dinfer-runs"), f"{run.name} (here)")
        story.click(
            story.button("compare"), panel.locator(".dinfer-sides"), "× as long; exposed communication"
        )
        story.click(story.tab("communication"), figure, "seconds since the run began")
        story.click(panel.locator("[data-figure=matrix]"), figure, "median, ms")
        links, lanes = panel.locator("section.dinfer-links"), panel.locator("section.dinfer-lanes")
        story.click(story.button("time"), links, "⚠ 0→2")
        slowest = links.locator("tbody tr").first
        expect(slowest).to_contain_text("⚠ 0→2")
        milliseconds, unit = slowest.locator("td").nth(1).inner_text().split()
        assert (float(milliseconds) >= MS, unit) == (True, "ms")
        # The longest message of that link: its time, its block, and the lane that it holds up.
        story.click(story.button("⚠ 0→2"), lanes.locator(".dinfer-on"), "rank 2 kv-in:0: recv kv")
        expect(lanes.locator(".dinfer-on")).to_contain_text("on the wire")
        expect(panel.get_by_label("time of the trace")).to_have_attribute(
            "data-rows", "rank 0,rank 1,rank 2,compute,hidden-in,hidden-out,kv-in:0,kv-in:1,kv-out:0,kv-out:1"
        )
        expect(panel.locator(".dinfer-block")).to_contain_text(re.compile(r"2 waits? for it"))
        expect(panel.locator(".dinfer-rank.dinfer-pointed")).to_contain_text("rank 2")
        story.shot()
        story.end(6)

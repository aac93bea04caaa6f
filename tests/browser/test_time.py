"""Time and find on a page without a kernel: what the page asks is answered by the kernel's own functions."""

from __future__ import annotations

import base64
import re
from typing import Any, Literal

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

from dinfer.run.state import Mark
from dinfer.trace.moment import moment_after
from dinfer.trace.notable import notable
from dinfer.trace.simulated import Machine, paper_trace
from dinfer.trace.stretch import stretch
from dinfer.views.bins import BinSize, binned
from dinfer.views.cells import COMPUTING
from dinfer.views.find import FindError, Searched, find
from dinfer.views.panel.scrubber import TimeQuestion, answer
from dinfer.views.recorded import RecordedRun
from tests.browser.conftest import Shot
from tests.support.axe import violations
from tests.support.doubles import PaperRun, paper_plan
from tests.support.panel_pages import BarePanel

pytestmark = pytest.mark.browser

FAULT = Mark(1, 2, 5, "differs", "rank 1 differs at layer 5, K, head 0")
LABELS = ["The code of Lima ", "is 471. The code ", "of Oslo is 306. ", "What is the code ", "of Lima?"]


class TracedPanel:
    """The panel of a run on paper that is done, whose link 0→1 is slow, and in which one layer took very long."""

    def __init__(self, page: Page, size: tuple[int, int, int] = (12, 5, 3)) -> None:
        self.page, self.answered = page, 0
        chunks = size[1]
        self.run = PaperRun(paper_plan(*size), (LABELS * chunks)[:chunks])
        self.run.events = slow_at(list(paper_trace(self.run.plan, Machine(slow={(0, 1): 8})).events))
        self.run.cut = self.run.cuts.end
        self.run.marks = [FAULT]
        self.recorded = RecordedRun(self.run)
        now = self.recorded.now()
        assert now is not None
        self.now, self.timeline = now, now.timeline
        states = self.timeline.states(self.timeline.span)
        self.panel = BarePanel(page, states, [FAULT])
        self.root = self.panel.root
        self.strip: Locator = self.root.get_by_label("time of the trace")
        self.search: Locator = self.root.get_by_role("searchbox")

    def serve(self) -> None:
        """Answer what the page has asked since the last time, until it asks no more."""
        while messages := self.page.evaluate(f"window.sent.slice({self.answered})"):
            self.answered += len(messages)
            for message in messages:
                self.reply(message)
            self.settle()

    def settle(self) -> None:
        """Wait until what has changed is drawn."""
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def reply(self, message: dict[str, Any]) -> None:
        if message["do"] == "time":
            content, buffers = answer(TimeQuestion.of(message), self.now, self.run.plan)
            about = {"view": message["view"], "number": message["number"]}
            texts = [base64.b64encode(one).decode() for one in buffers]
            self.page.evaluate(
                "([content, texts]) => window.hear(content, ...texts)", [{"time": about | content}, texts]
            )
        elif message["do"] == "find":
            about = {"view": message["view"], "number": message["number"], "hits": [], "count": 0}
            run = Searched(self.run.plan, self.run.labels, self.now.standing, self.timeline)
            try:
                hits, count = find(message["query"], run)
                about |= {"hits": [hit.as_dict() for hit in hits], "count": count}
            except FindError as error:
                about["said"] = str(error)
            self.page.evaluate("(content) => window.hear(content)", {"found": about})

    def open(self) -> None:
        self.root.get_by_role("button", name="time", exact=True).click()
        self.serve()

    def spot(self, time: int) -> float:
        """The x of a time on the strip, in its pixels."""
        begin, end = map(float, (self.strip.get_attribute("data-seen") or "").split())
        left, wide = (float(self.strip.get_attribute(f"data-{name}") or 0) for name in ("left", "wide"))
        return left + (time - begin) / (end - begin) * wide

    def find(self, query: str) -> Locator:
        """Search; the hits."""
        self.search.fill(query)
        self.search.press("Enter")
        self.serve()
        return self.root.get_by_label("found").get_by_role("button")

    def at(self) -> int:
        """The time that is shown, in nanoseconds."""
        return int(float(self.strip.get_attribute("data-at") or "nan"))


def slow_at(events: list[Any]) -> list[Any]:
    """The events, as if one layer in their middle had taken 40 ms more than it did, and nobody had waited for it."""
    layers = [n for n, event in enumerate(events) if event.kind == "layer"]
    slow = layers[len(layers) // 2]
    events[slow] = events[slow].__class__(
        **{**events[slow].as_dict(), "end": events[slow].end + 40_000_000, "call": None}
    )
    return events


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dragging_shows_the_map_the_ranks_and_the_links_of_that_moment(
    page: Page, shot: Shot, scheme: Literal["light", "dark"]
) -> None:
    page.emulate_media(color_scheme=scheme)
    traced = TracedPanel(page)
    traced.open()
    expect(traced.root).to_have_attribute("data-past", "")
    middle, box = traced.spot(traced.timeline.span // 3), traced.strip.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] - 4, box["y"] + 6)
    page.mouse.down()
    page.mouse.move(box["x"] + middle, box["y"] + 6, steps=5)
    page.mouse.up()
    traced.serve()
    at = traced.at()
    assert abs(at - traced.timeline.span // 3) < traced.timeline.span / 100
    call = traced.root.locator(".dinfer-time .dinfer-copy-call code", has_text="run.at")
    seconds = float((call.text_content() or "").removeprefix("run.at(").removesuffix(")"))
    assert round(seconds * 1e9) == at
    then = moment_after(traced.timeline.trace, seconds)
    assert then.at == traced.timeline.began + at
    shown = traced.panel.drawn()
    shape = traced.panel.geometry()
    states = binned(
        traced.timeline.states(at), BinSize(shape["perLayer"], shape["perChunk"], shape["perRank"])
    )
    assert np.array_equal(shown & 7, states)
    assert (states == COMPUTING).any()
    expect(traced.root.locator(".dinfer-rank").first.locator(".dinfer-word")).to_have_text("computing")
    expect(traced.root.locator("section.dinfer-links")).to_contain_text("0→1")
    shot(f"time-moment-{scheme}")
    page.keyboard.press("Shift+PageUp")  # a stretch, too
    traced.serve()
    expect(traced.root.locator("section.dinfer-totals")).to_be_visible()
    assert not violations(page, ".dinfer-panel")
    traced.root.get_by_role("button", name="now", exact=True).click()
    traced.serve()
    expect(call).to_have_count(0)
    assert np.array_equal(
        traced.panel.drawn() & 7, binned(traced.timeline.states(traced.timeline.span), BinSize())
    )


def test_a_stretch_selected_by_mouse_has_totals_that_add_up(page: Page, shot: Shot) -> None:
    traced = TracedPanel(page)
    traced.open()
    box, span = traced.strip.bounding_box(), traced.timeline.span
    assert box
    traced.root.get_by_role("button", name="select a stretch").click()
    page.mouse.move(box["x"] + traced.spot(span // 4), box["y"] + 6)
    page.mouse.down()
    page.mouse.move(box["x"] + traced.spot(span // 2), box["y"] + 6, steps=4)
    page.mouse.up()
    traced.serve()
    [begin, end] = page.evaluate("window.sent.at(-1).stretch")
    totals = stretch(traced.timeline.trace, traced.timeline.began + begin, traced.timeline.began + end)
    section = traced.root.locator("section.dinfer-totals")
    call = traced.root.locator(".dinfer-time .dinfer-copy-call code", has_text="run.stretch")
    expect(call).to_have_text(f"run.stretch({begin / 1e9:.9g}, {end / 1e9:.9g})")
    rows = section.locator("table").first.locator("tbody tr")
    expect(rows).to_have_count(len(totals.ranks) + 1)
    shares = [float(one) for one in re.findall(r"([\d.]+) %", rows.last.inner_text())]
    assert round(sum(shares), 6) == 100
    megabytes = f"{totals.links[0].bytes / 1e6:.3f}"
    expect(section.locator("table").nth(1).locator("tbody tr").first).to_contain_text(megabytes)
    expect(section.locator("th", has_text="bubble").first).to_have_attribute(
        "title", re.compile("nothing to do")
    )
    shot("time-stretch-light")


def test_the_keyboard_reaches_everything_on_the_strip(page: Page) -> None:
    traced = TracedPanel(page)
    traced.root.focus()
    page.keyboard.press("t")
    traced.serve()
    traced.strip.focus()
    span = traced.timeline.span
    page.keyboard.press("Home")
    traced.serve()
    assert traced.at() == 0
    for key, step in (("ArrowRight", 1), ("PageUp", 20), ("ArrowLeft", -1)):
        before = traced.at()
        page.keyboard.press(key)
        traced.serve()
        assert abs(traced.at() - before - step * span / 200) <= 1
    expect(traced.strip).to_have_attribute("role", "slider")
    expect(traced.strip).to_have_attribute("aria-valuetext", re.compile("ms of"))
    page.keyboard.press("Shift+PageUp")
    traced.serve()
    expect(traced.root.locator("section.dinfer-totals")).to_be_visible()
    page.keyboard.press("+")
    traced.serve()
    begin, end = map(float, (traced.strip.get_attribute("data-seen") or "").split())
    assert end - begin == pytest.approx(span / 2, rel=0.01)
    page.keyboard.press("Escape")
    traced.serve()
    expect(traced.strip).to_have_attribute("data-at", "now")
    expect(traced.root.locator("section.dinfer-totals")).to_be_hidden()


def test_what_took_long_leads_to_its_block_lane_and_rank(page: Page, shot: Shot) -> None:
    traced = TracedPanel(page)
    traced.open()
    slow = next(one for one in notable(traced.timeline.trace) if one.kind == "slow op")
    traced.root.locator("section.dinfer-notable").get_by_role(
        "button", name=re.compile("slow: layer")
    ).first.click()
    traced.serve()
    assert slow.begin - traced.timeline.began <= traced.at() <= slow.end - traced.timeline.began
    expect(traced.panel.canvas).to_have_attribute("data-selected", f"{slow.layer} {slow.chunk}")
    expect(traced.root.locator(".dinfer-pointed")).to_contain_text(f"rank {slow.rank}")
    expect(traced.strip).to_have_attribute("data-rows", re.compile("compute"))
    shot("time-slow-op-light")
    page.keyboard.press("Escape")
    box, row = traced.strip.bounding_box(), slow.rank
    assert box
    page.mouse.click(
        box["x"] + traced.spot((slow.begin + slow.end) // 2 - traced.timeline.began),
        box["y"] + 16 + 6 + 14 * row,
    )
    traced.serve()
    assert slow.begin - traced.timeline.began <= traced.at() <= slow.end - traced.timeline.began


def test_without_a_kernel_there_is_only_now(page: Page, shot: Shot) -> None:
    traced = TracedPanel(page)
    traced.open()
    now = traced.panel.drawn()
    clock, notable_ones = traced.root.locator(".dinfer-clock"), traced.root.locator("section.dinfer-notable")
    traced.strip.focus()
    page.keyboard.press("Home")
    traced.serve()
    expect(clock).to_have_text(re.compile(r"^0 µs of "))
    page.keyboard.press("PageUp")  # is asked, and never answered
    page.evaluate("window.lose()")
    expect(clock).to_have_text(re.compile("^now of "))
    expect(traced.root).to_have_attribute("data-past", "")
    traced.settle()
    assert np.array_equal(traced.panel.drawn(), now)
    expect(traced.root.locator("section.dinfer-links")).to_be_hidden()
    sent = page.evaluate("window.sent.length")
    traced.strip.focus()
    for key in ("Home", "PageUp", "n"):
        page.keyboard.press(key)
    notable_ones.get_by_role("button").first.click()
    box = traced.strip.bounding_box()
    assert box
    page.mouse.click(box["x"] + traced.spot(traced.timeline.span // 3), box["y"] + 6)
    traced.settle()
    expect(traced.strip).to_have_attribute("data-at", "now")
    expect(clock).to_have_text(re.compile("^now of "))
    assert np.array_equal(traced.panel.drawn(), now)
    assert page.evaluate("window.sent.length") == sent
    for control in ("time", "select a stretch", "all"):
        expect(traced.root.get_by_role("button", name=control, exact=True).first).to_be_disabled()
    expect(traced.search).to_be_disabled()
    shot("time-lost-light")


def test_a_block_is_described_as_it_was_then(page: Page) -> None:
    traced = TracedPanel(page)
    traced.panel.click(FAULT.layer, FAULT.chunk)
    mark = traced.panel.block.locator(".dinfer-mark")
    expect(mark).to_have_text(FAULT.text)
    traced.open()
    traced.strip.focus()
    page.keyboard.press("Home")
    traced.serve()
    page.mouse.move(1, 1)
    expect(traced.panel.block).to_contain_text("not computed yet")
    expect(mark).to_have_count(0)


def test_find_lists_what_there_is_and_leads_there(page: Page, shot: Shot) -> None:
    traced = TracedPanel(page)
    hits = traced.find("lima")
    expect(hits).to_have_count(2)
    hits.nth(1).click()
    expect(traced.panel.canvas).to_have_attribute("data-selected", "0 4")
    hits = traced.find("slowest recv kv 0>1")
    hits.first.click()
    traced.serve()
    expect(traced.root).to_have_attribute("data-past", "yes")
    expect(traced.root.locator(".dinfer-pointed")).to_contain_text("rank 1")
    shot("find-slowest-light")
    hits = traced.find("differs")
    expect(hits).to_have_count(1)
    expect(hits).to_have_attribute("data-severity", "error")
    hits.click()
    expect(traced.panel.canvas).to_have_attribute("data-selected", "5 2")
    assert traced.find("nowhere").count() == 0
    expect(traced.root.locator(".dinfer-found").first).to_contain_text(
        "Search for text of the prompt; layer 5"
    )


def test_find_needs_no_mouse(page: Page) -> None:
    traced = TracedPanel(page)
    traced.root.focus()
    page.keyboard.press("/")
    expect(traced.search).to_be_focused()
    page.keyboard.type("c3 l2")
    page.keyboard.press("Enter")
    traced.serve()
    page.keyboard.press("Enter")
    expect(traced.panel.canvas).to_have_attribute("data-selected", "2 3")
    page.keyboard.press("ArrowDown")
    expect(traced.root.get_by_label("found").get_by_role("button").first).to_be_focused()
    page.keyboard.press("Escape")
    expect(traced.root).to_be_focused()
    expect(traced.root.get_by_label("found")).to_be_hidden()

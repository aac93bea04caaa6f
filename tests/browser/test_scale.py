"""The map at every size, on a page without a kernel: all of it is seen, no mark is lost, clicks lead to the block."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from playwright.sync_api import Page, expect
from plotly.offline import get_plotlyjs

from dinfer.kv.source import Subject
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.run.state import Mark
from dinfer.views.bins import BinSize, binned
from dinfer.views.cells import DIFFERS, NONFINITE
from dinfer.views.figures.style import html_config
from dinfer.views.panel.communication import FIGURES
from dinfer.views.panel.inspector import Fetched, InspectRequest, picture, window
from tests.browser.conftest import Shot
from tests.support.maps import half_done
from tests.support.panel_pages import BarePanel
from tests.support.traces import on_paper

pytestmark = pytest.mark.browser

SIZES = ((1, 1, 1), (6, 6, 3), (36, 170, 3), (80, 1000, 8), (200, 1000, 16), (200, 40, 64), (3, 5000, 2))
"""layers, chunks, ranks"""
FAULT = Mark(2, 109, 5, "differs", "rank 2 differs at layer 5, K, head 0")


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_a_map_of_any_size_is_seen_whole(
    page: Page, shot: Shot, size: tuple[int, int, int], scheme: Literal["light", "dark"]
) -> None:
    page.emulate_media(color_scheme=scheme)
    layers, chunks, ranks = size
    last = Mark(ranks - 1, chunks - 1, layers - 1, "armed", "a fault is armed")
    panel = BarePanel(page, half_done(*size), [last], [(layers // 2, chunks // 2)], labels="some words")
    at = panel.geometry()
    per = BinSize(at["perLayer"], at["perChunk"], at["perRank"])
    assert np.array_equal(panel.drawn(), binned(panel.states, per))
    assert at["left"] + at["across"] * at["columns"] <= at["width"]
    assert panel.canvas.evaluate("(canvas) => canvas.scrollWidth <= canvas.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert (per == BinSize()) == (panel.scope.is_hidden())
    if per != BinSize():
        expect(panel.scope).to_contain_text(per.text.split(",")[0])
    shot(f"map-{'x'.join(map(str, size))}-{scheme}")


def test_nan_is_marked_in_a_block_of_any_size_and_told_in_a_line(page: Page) -> None:
    text = "NaN or Inf in K or V of c1 l1, computed by rank 0"
    for size in ((6, 6, 3), (36, 170, 3)):
        panel = BarePanel(page, half_done(*size), [Mark(0, 1, 1, "nonfinite", text)])
        at = panel.geometry()
        assert np.argwhere(panel.drawn() & NONFINITE)[:, :2].tolist() == [[1, 1 // at["perChunk"]]] * 3
        assert panel.of("nonfinite") in panel.colours(1, 1, 1)  # in the middle of parts that look alike
    panel = BarePanel(page, half_done(6, 6, 3), [Mark(0, 1, 1, "nonfinite", text)])
    panel.click(1, 1)
    expect(panel.block).to_contain_text(text)
    line = panel.root.locator("> .dinfer-nonfinite")
    expect(line).to_be_hidden()
    page.evaluate(
        "window.model.set('shown', { ...window.model.get('shown'), nonfinite: 'not finite: first' })"
    )
    expect(line).to_contain_text("not finite: first")  # after a sign of its severity


def test_a_fault_in_chunk_109_of_170_is_seen_and_found_by_clicks(page: Page, shot: Shot) -> None:
    panel = BarePanel(page, half_done(36, 170, 3), [FAULT])
    assert np.argwhere(panel.drawn() & DIFFERS)[:, 1].tolist() == [109 // panel.geometry()["perChunk"]]
    assert panel.of("differs") in panel.colours(5, 109, 2)
    expect(panel.scope).to_contain_text("each cell is 2 chunks: click one to zoom in")
    x, y = panel.spot(5, 109)
    panel.canvas.hover(position={"x": x, "y": y})
    expect(panel.block).to_contain_text("chunks 108–109, layer 5")
    expect(panel.block).to_contain_text("c109 l5: differs or corrupt on rank 2")
    panel.click(5, 109)
    expect(panel.block).to_contain_text("block c109 l5")
    expect(panel.block).to_contain_text(FAULT.text)
    expect(panel.scope).to_contain_text("of 170")
    at = panel.geometry()
    assert (at["perChunk"], at["chunk"] <= 109 < at["chunk"] + at["columns"]) == (1, True)
    assert panel.drawn()[5 - at["layer"], 109 - at["chunk"], 2] & DIFFERS
    shot("map-fault-zoomed-light")
    panel.click(5, 110)
    expect(panel.block).to_contain_text("block c110 l5")


def test_what_is_outside_is_said_and_seen_again(page: Page, shot: Shot) -> None:
    others = [Mark(0, chunk, layer, "armed", "a fault is armed") for chunk in (3, 4) for layer in (0, 79)]
    panel = BarePanel(page, half_done(80, 1000, 8), [FAULT, *others], [(None, 500), (7, None)])
    panel.click(70, 800)
    expect(panel.scope).to_contain_text(
        "; outside: differs or corrupt in 1 block, a fault is armed in 4 blocks, 2 breakpoints"
    )
    shot("map-outside-light")
    panel.buttons.get_by_text("all").click()
    expect(panel.scope).not_to_contain_text("outside")
    assert (
        panel.drawn()[5 // panel.geometry()["perLayer"], 109 // panel.geometry()["perChunk"]].max() >= DIFFERS
    )


def test_keys_zoom_and_what_is_seen_follows_the_selection(page: Page) -> None:
    panel = BarePanel(page, half_done(80, 1000, 8))
    panel.click(40, 500)
    at = panel.geometry()
    expect(panel.block).to_contain_text("block c")
    for _ in range(at["columns"]):
        panel.canvas.press("ArrowRight")
    expect(panel.canvas).not_to_have_attribute("data-geometry", str(at))
    chunk = int((panel.canvas.get_attribute("data-selected") or "").split()[1])
    at = panel.geometry()
    assert at["chunk"] <= chunk < at["chunk"] + at["columns"] * at["perChunk"]
    panel.canvas.press("0")
    expect(panel.scope).to_contain_text("each cell is")
    panel.canvas.press("+")
    expect(panel.scope).to_contain_text("of 1,000")


def test_a_double_click_on_a_bin_zooms_in_and_sets_no_breakpoint(page: Page) -> None:
    panel = BarePanel(page, half_done(36, 170, 3), [FAULT])
    x, y = panel.spot(5, 109)
    panel.canvas.dblclick(position={"x": x, "y": y})
    expect(panel.block).to_contain_text("block c109 l5")
    assert page.evaluate("window.sent") == []
    x, y = panel.spot(5, 109)
    panel.canvas.dblclick(position={"x": x, "y": y})
    page.wait_for_function("window.sent.length")
    [message] = page.evaluate("window.sent")
    assert (message["do"], message["layer"], message["chunk"]) == ("break_at", 5, 109)
    panel.canvas.dblclick(position={"x": 30, "y": 5})  # beside the map
    assert len(page.evaluate("window.sent")) == 1


def test_keys_work_after_a_button_of_the_map_has_gone(page: Page) -> None:
    panel = BarePanel(page, half_done(36, 60, 3))
    panel.click(5, 9)
    panel.canvas.press("+")
    panel.buttons.get_by_text("all").click()
    expect(panel.scope).to_be_hidden()
    page.keyboard.press("ArrowRight")
    expect(panel.block).to_contain_text("block c10 l5")


class Values:
    """The kernel of an inspector: K of one layer of 1,000 chunks of 16 tokens, whose values are their tokens."""

    def __init__(self, panel: BarePanel) -> None:
        self.panel, tokens = panel, 16_000
        shape = partition(layers=1, tokens=tokens, world_size=1, chunk_size=16)
        plan = build(shape, "pipelined", "pairwise")
        self.subject = Subject("this run", ("",), plan, tuple(range(tokens)), (), 2, 4, torch.float32, "")
        self.values = np.arange(tokens, dtype=np.float32)[None, :, None].repeat(2, 0).repeat(4, 2)

    def answer(self) -> range:
        """Answer the newest question; the tokens that are seen then."""
        asked = self.panel.sent("inspect")
        seen = window(self.subject.spans, asked["chunk"], 2048)
        tokens = slice(self.subject.spans[seen.start].start, self.subject.spans[seen.stop - 1].stop)
        part = self.values[:, tokens]
        want = InspectRequest("", 0, 0, None, 0, 0, "a", "full", "", chunk=asked["chunk"])
        head, codes = picture(want, Fetched(self.subject, part, part, seen, (16_000, 16_000)))
        to = {"view": asked["view"], "question": asked["question"], "stamp": str(tokens)}
        self.panel.hear({"kv": {**head, **to}}, codes)
        return range(tokens.start, tokens.stop)


def test_the_values_of_a_long_prompt_are_seen_around_the_selected_chunk(page: Page, shot: Shot) -> None:
    panel = BarePanel(page, half_done(80, 1000, 8), [FAULT])
    values = Values(panel)
    panel.click(5, 109)
    panel.root.locator('[data-tab="KV"]').click()
    seen = values.answer()
    assert 109 * 16 in seen
    said = panel.root.locator(".dinfer-scale")
    expect(said).to_contain_text(f"tokens {seen.start:,}–{seen.stop - 1:,}: chunks ")
    expect(said).to_contain_text("of 1,000")
    shot("inspector-window-light")
    heatmap = panel.root.locator(".dinfer-heatmap")
    page.wait_for_selector(".dinfer-heatmap[data-view]")
    heatmap.hover(position={"x": 60, "y": 100})
    token = panel.sent("value")["token"]
    assert token in seen
    expect(panel.root.locator(".dinfer-spot")).to_contain_text(f"token {token} ")
    panel.root.get_by_title("later tokens").click()
    later = values.answer()
    assert seen.stop in later
    expect(said).to_contain_text(f"tokens {later.start:,}–{later.stop - 1:,}")


UNDER_TOOLS = """(place) => {
    const boxOf = (node) => node.getBoundingClientRect(), tools = boxOf(place.querySelector(".modebar"));
    if (!tools.width) return ["no tools"];
    const isUnder = (box) => box.width && box.left < tools.right && box.right > tools.left
        && box.top < tools.bottom && box.bottom > tools.top;
    const covered = [...place.querySelectorAll("text, .bg")].filter((node) => isUnder(boxOf(node)));
    return covered.map((node) => node.textContent);
}"""
"""what plotly's tools, which appear over a figure, cover of its texts and plots"""


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_figures_of_eight_ranks_are_readable(
    page: Page, shot: Shot, scheme: Literal["light", "dark"]
) -> None:
    """A tall figure scrolls in its place; squeezed, its lanes would cover one another."""
    page.emulate_media(color_scheme=scheme)
    panel = BarePanel(page, half_done(16, 12, 8))
    panel.root.locator('[data-tab="communication"]').click()
    panel.hear({"plotly": panel.sent("plotly")["view"], "config": html_config()}, get_plotlyjs().encode())
    place = panel.root.locator(".dinfer-figure")
    for name, draw in FIGURES.items():
        panel.root.locator(f'[data-figure="{name}"]').click()
        figure = draw(on_paper(16, 12, 8), dark=scheme == "dark")
        head = {"view": panel.sent("figure")["view"], "name": name, "seen": 1, "caption": "some events"}
        panel.hear({"figure": {**head, "json": figure.to_json()}})
        page.wait_for_selector(f'.dinfer-figure[data-name="{name}"]')
        high = place.locator(".main-svg").first.evaluate("(svg) => svg.getBoundingClientRect().height")
        assert high == figure.layout.height
        assert place.evaluate("(place) => place.scrollWidth <= place.clientWidth")
        assert place.evaluate("(place) => place.clientHeight") <= 480
        legend = place.locator(".legend .bg")
        if legend.count():
            assert legend.evaluate("(box) => box.getBoundingClientRect().height") < 80
        place.hover(position={"x": 300, "y": 150})
        assert place.evaluate(UNDER_TOOLS) == []
        shot(f"figures-8-{name}-{scheme}")

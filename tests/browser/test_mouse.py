"""What only a mouse does: breakpoints by the form, play at a pace, a drag over values, a verdict unfolded."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_debugger import CELLS as DEBUGGER
from tests.browser.test_debugger import CONNECT, SHOW, TOP, WHERE, Debugger, number
from tests.support.jupyter import Notebook

pytestmark = [pytest.mark.browser, pytest.mark.slow]

BREAKPOINTS, VALUES, CLOSE, HANG, HUNG = 3, 4, 5, 6, 7
CELLS = [
    DEBUGGER[CONNECT],
    DEBUGGER[SHOW],
    DEBUGGER[WHERE],
    "print(run.breakpoints)",
    "import json; print(json.dumps(run.kv(layer=0, rank=0).k[:, :].tolist()))",
    "session.close()",
    'hung = session.prefill(prompt, chunk_size=32, schedule="batched", unsafe=True)',
    "hung",
]
PLAYED = """() => {
    const map = document.querySelector(".dinfer-panel canvas[data-cells]");
    window.played = [];
    new MutationObserver(() => window.played.push(map.dataset.cells))
        .observe(map, { attributes: true, attributeFilter: ["data-cells"] });
}"""


class Form:
    """The list of breakpoints and the form below it."""

    def __init__(self, panel: Debugger) -> None:
        self.root = panel.root.locator(".dinfer-stops")
        self.list = self.root.locator(".dinfer-list > div")

    def fill(self, **values: object) -> None:
        for name, value in values.items():
            self.root.locator(f'input[name="{name}"]').fill(str(value))
        self.root.locator("form button").click()

    def press(self, what: str) -> None:
        self.root.get_by_label(what, exact=True).click()


def view_of(heatmap: Locator) -> dict[str, Any]:
    """What of the values is seen, and where on the canvas."""
    found: dict[str, Any] = json.loads(heatmap.get_attribute("data-view") or "{}")
    return found


def test_breakpoints_are_set_changed_and_removed_and_end_a_play(notebook: OpenNotebook, shot: Shot) -> None:
    book = notebook(CELLS)
    book.run(CONNECT)
    book.run(SHOW)
    panel = Debugger(book)
    set_breakpoints(book, panel, shot)
    play_to_a_breakpoint(panel)
    book.run(CLOSE)


def test_values_are_zoomed_and_a_verdict_is_unfolded(notebook: OpenNotebook, page: Page, shot: Shot) -> None:
    book = notebook(CELLS)
    book.run(CONNECT)
    book.run(SHOW)
    panel = Debugger(book)
    panel.press("resume")
    expect(panel.root).to_have_attribute("data-state", "done")
    zoom(book, panel, page, shot)
    unfold_a_verdict(book, shot)
    book.run(CLOSE)


def set_breakpoints(book: Notebook, panel: Debugger, shot: Shot) -> None:
    form = Form(panel)
    form.root.locator("summary").click()
    form.fill(layer=2, when="absmax > 1e6")
    expect(form.list).to_have_text(["#1: after layer 2, when absmax > 1e+06✎×"])
    assert book.run(BREAKPOINTS).strip() == "#1: after layer 2, when absmax > 1e+06"
    form.press("change breakpoint 1")
    expect(form.root.locator("form button")).to_have_text("change #1")
    form.fill(when="absmux > 7")
    expect(panel.root.locator(".dinfer-banner")).to_contain_text("when is 'absmux > 7'; it must be one of")
    expect(form.list).to_have_count(1)
    form.fill(chunk=2, when="")
    expect(form.list).to_have_text(["#2: after layer 2, chunk 2✎×"])
    expect(form.root.locator("form button")).to_have_text("add")
    form.fill(chunk=1, when="nan")
    expect(form.list).to_have_count(2)
    panel.notebook.page.evaluate(TOP)
    shot("mouse-breakpoints-light")
    form.press("remove breakpoint 3")
    expect(form.list).to_have_count(1)
    assert book.run(BREAKPOINTS).strip() == "#2: after layer 2, chunk 2"


def play_to_a_breakpoint(panel: Debugger) -> None:
    """Layer by layer; the map is seen to move between, and stops where the breakpoint is."""
    page = panel.notebook.page
    panel.press("step:layer")
    panel.call('run.step("layer")')
    page.evaluate(PLAYED)
    panel.root.get_by_label("speed of play").select_option("10")
    panel.press("resume")
    panel.call('run.play("layer", per_second=10)')
    expect(panel.root.locator(".dinfer-banner")).to_contain_text("stopped at #2: after layer 2, chunk 2")
    states = panel.agrees()
    at = (2 * len(states) // 3 // 6 + 2) * 3
    assert states[at : at + 3] == "444"
    assert states[at + 3 : at + 6] != "444"
    played: list[str] = page.evaluate("window.played")
    here = [sum(state != "0" for state in one) for one in played]
    assert len(set(here)) > 5
    assert here == sorted(here)


def zoom(book: Notebook, panel: Debugger, page: Page, shot: Shot) -> None:
    """Drag a box over a part of one head: that is all that is seen then, and each value of it can be read."""
    values: list[list[list[float]]] = json.loads(book.run(VALUES))
    page.evaluate(TOP)
    panel.open("KV")
    heatmap = panel.root.locator(".dinfer-heatmap")
    expect(heatmap).to_have_attribute("data-view", re.compile("wide"))
    whole = view_of(heatmap)
    assert (whole["x"], whole["y"], whole["wide"]) == (0, 0, len(values[0]))
    box = heatmap.bounding_box()
    assert box

    def spot(token: float, row: float) -> tuple[float, float]:
        across = box["x"] + whole["left"] + token / whole["wide"] * whole["across"]
        return across, box["y"] + whole["top"] + row / whole["high"] * whole["down"]

    page.mouse.move(*spot(4, 6))
    page.mouse.down()
    page.mouse.move(*spot(10, 20), steps=4)
    page.mouse.move(*spot(16, 26), steps=4)
    shot("mouse-drag-light")
    page.mouse.up()
    page.wait_for_function("JSON.parse(document.querySelector('.dinfer-heatmap').dataset.view).wide < 13")
    seen = view_of(heatmap)
    assert [seen[name] for name in ("x", "y", "wide", "high")] == pytest.approx([4, 6, 12, 20], abs=0.2)
    panel.point_at_value(0, 11, 17)
    first = panel.root.locator(".dinfer-value code").first
    expect(panel.root.locator(".dinfer-value code")).to_have_count(3)
    assert number(first.inner_text()) == pytest.approx(values[0][11][17], rel=1e-5)
    shot("mouse-zoomed-light")
    heatmap.dblclick()
    page.wait_for_function(
        "(wide) => JSON.parse(document.querySelector('.dinfer-heatmap').dataset.view).wide === wide",
        arg=whole["wide"],
    )


def unfold_a_verdict(book: Notebook, shot: Shot) -> None:
    book.run(HANG)
    book.run(HUNG)
    panel = Debugger(book, HUNG)
    banner = panel.root.locator(".dinfer-banner")
    expect(banner).to_contain_text("waits")
    more = banner.get_by_role("button", name="more")
    expect(more).to_be_visible()
    expect(panel.root).to_have_attribute("data-state", "hung")
    expect(banner).to_have_attribute("data-severity", "error")
    said = banner.locator(".dinfer-said")
    folded = said.inner_text()
    more.click()
    expect(said).to_contain_text("all frames of all threads")
    panel.root.evaluate("(root) => root.scrollIntoView()")
    shot("mouse-verdict-light")
    banner.get_by_role("button", name="less").click()
    expect(said).to_have_text(folded)

"""What a person finds out with the panel: breakpoints, faults, KV, links. Ranks are threads of the kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_panel import PanelPage
from tests.support.jupyter import Notebook

pytestmark = pytest.mark.browser

CONNECT, SHOW, WHERE, BREAK, INJECT, PARTS, NEXT, CLOSE = range(8)
LAYER, CHUNK, RANK = 3, 1, 2
CELLS = [
    """
import dinfer
session = dinfer.connect("threads", n=3)
session.load("demo")
prompt = "The code of Lima is 471. The code of Oslo is 306. What is the code of Lima? The code of Lima is"
run = session.prefill(prompt, chunk_size=4, paused=True)
""",
    "run",
    """
from dinfer.views.cells import CellMap, marked
standing = run.standing()
states = marked(CellMap(run.plan).states(standing.stands), standing.marks).flatten()
print("".join("0123456789abcdefghijklmnopqrstuv"[state] for state in states))
""",
    "print(run.breakpoints)",
    f'run.inject("bitflip", rank={RANK}, layer={LAYER}, chunk={CHUNK}, head=0, token=5, dim=7, where="memory");',
    f"a, b = (float(run.kv(layer={LAYER}, rank=rank).k[0, 5, 7]) for rank in (0, {RANK})); print(a, b, a - b)",
    "run = session.prefill(prompt, chunk_size=4, paused=True)",
    "session.close()",
]


class Debugger(PanelPage):
    """The panel, with all its tabs."""

    def open(self, tab: str) -> None:
        self.root.locator(f'[data-tab="{tab}"]').click()

    def key(self, key: str, call: str) -> None:
        """Press a key and wait for what it does."""
        self.done = self.root.get_attribute("data-done") or "0"
        self.canvas.press(key)
        self.call(call)

    def choose(self, field: str, value: str) -> None:
        self.root.locator(f'select[data-field="{field}"]').select_option(value)

    def point_at_value(self, head: int, token: int, dim: int) -> None:
        """Move the mouse to a value of the heatmap."""
        heatmap = self.root.locator(".dinfer-heatmap")
        view = json.loads(heatmap.get_attribute("data-view") or "{}")
        x = view["left"] + (token + 0.5 - view["x"]) / view["wide"] * view["across"]
        y = view["top"] + (head * view["dims"] + dim + 0.5 - view["y"]) / view["high"] * view["down"]
        heatmap.hover(position={"x": x, "y": y})

    def live(self) -> set[str]:
        """What the buttons say that can be pressed, hidden ones too, but not those that plotly draws."""
        return set(self.root.locator("button:enabled:not(.dinfer-figure *)").all_text_contents())


ALWAYS = {
    "map", "KV", "communication", "runs", "time", "copy", "more", "+", "−", "all", "copy as a cell",
    "save as a notebook", "now", "select a stretch",
}  # fmt: skip
"""buttons that need neither ranks nor kernel"""
FIGURE_NAMES = {"latency", "distribution", "rank × rank", "lanes", "exposed"}
TOP = "document.querySelector('.dinfer-panel').scrollIntoView()"


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_a_person_stops_at_a_breakpoint_breaks_a_block_and_finds_it(
    notebook: OpenNotebook, page: Page, shot: Shot, screenshots: Path
) -> None:
    book = notebook(CELLS)
    book.run(CONNECT)
    book.run(SHOW)
    panel = Debugger(book)
    assert set(panel.agrees()) == {"0"}
    page.evaluate(TOP)

    cells = page.locator(".jp-Notebook .jp-Cell").count()
    panel.key("w", 'run.step("wave")')
    assert "4" in panel.agrees()
    panel.key("b", 'run.step_back("wave")')
    assert set(panel.agrees()) == {"0"}
    assert (
        page.locator(".jp-Notebook .jp-Cell").count() == cells
    )  # JupyterLab's own keys would have added one
    x, y = panel.spot(LAYER, CHUNK)
    panel.canvas.dblclick(position={"x": x, "y": y})
    listed = panel.root.locator(".dinfer-stops .dinfer-list")
    expect(listed).to_contain_text(f"after layer {LAYER}, chunk {CHUNK}")
    assert f"after layer {LAYER}, chunk {CHUNK}" in book.run(BREAK)
    panel.press("resume")
    expect(panel.root.locator(".dinfer-banner")).to_contain_text("stopped at #1")
    states = panel.agrees()
    at = (LAYER * len(states) // 3 // 6 + CHUNK) * 3
    assert states[at : at + 3] == "444"
    shot("debugger-breakpoint-light")

    book.run(INJECT)
    expect(panel.root.locator(".dinfer-faults")).to_contain_text("bitflip")
    assert panel.agrees()[at : at + 3] == "44k"  # armed, and struck
    panel.press("diff")
    expect(panel.root.locator(".dinfer-banner")).to_contain_text(f"rank {RANK} differs at layer {LAYER}")
    assert panel.agrees()[at : at + 3] == "44s"
    panel.click(LAYER, CHUNK)
    page.evaluate(TOP)
    shot("debugger-fault-light")
    panel.root.screenshot(path=screenshots / "panel.png")  # the README's

    a, b, difference = map(float, book.run(PARTS).split())
    page.evaluate(TOP)
    assert difference != 0
    panel.open("KV")
    panel.root.locator('[data-show="a-b"]').click()
    expect(panel.root.locator(".dinfer-scale")).to_contain_text("1 value differs")
    expect(panel.root.locator(".dinfer-verdict")).to_contain_text(f"rank {RANK} differs at layer {LAYER}")
    panel.point_at_value(0, 5, 7)
    values = panel.root.locator(".dinfer-value code")
    expect(values).to_have_count(3)
    said = [number(text) for text in values.all_inner_texts()]
    assert said == pytest.approx([a, b, difference], rel=1e-5)
    shot("debugger-kv-difference-light")
    panel.choose("b", "1")
    expect(panel.root.locator(".dinfer-scale")).to_contain_text("no value differs")
    panel.root.locator('[data-show="a"]').click()
    expect(panel.root.locator(".dinfer-scale")).to_contain_text("rank 0,")
    shot("debugger-kv-light")

    panel.open("communication")
    figure = panel.root.locator(".dinfer-figure")
    expect(figure).to_have_attribute("data-name", "latency")
    before = int(figure.get_attribute("data-seen") or 0)
    assert before > 0
    panel.press("resume")
    page.wait_for_function(
        "(before) => Number(document.querySelector('.dinfer-figure').dataset.seen) > before", arg=before
    )
    shot("debugger-latency-light")
    for name in ("distribution", "matrix", "gantt", "exposure"):
        panel.root.locator(f'[data-figure="{name}"]').click()
        expect(figure).to_have_attribute("data-name", name)
        shot(f"debugger-{name}-light")
    assert panel.root.locator("[data-title*='Cloud'], [data-title*='cloud']").count() == 0
    book.use_theme("dark")
    shot("debugger-exposure-dark")
    panel.open("KV")
    shot("debugger-kv-dark")
    panel.open("map")
    shot("debugger-map-dark")
    book.use_theme("light")  # the lab keeps it for the tests that follow
    check_over(book, panel, shot)
    book.run(CLOSE)


def check_over(book: Notebook, panel: Debugger, shot: Shot) -> None:
    """Another run begins: what moved this one is seen to do nothing, and one line says why and what to do."""
    assert {"layer", "✎", "×", "add", "disarm"} <= panel.live()
    book.run(NEXT)
    over = "this run is over: another run has begun; session.debugger() shows it"
    said = panel.root.locator(".dinfer-banner .dinfer-said")
    expect(said).to_have_text(over)
    expect(panel.root.locator(".dinfer-rank .dinfer-word")).to_have_text(["over"] * 3)
    assert panel.live() == {*ALWAYS, "dismiss", *FIGURE_NAMES}
    expect(panel.root.locator(".dinfer-bar select, .dinfer-stops input").locator(":enabled")).to_have_count(0)
    done = panel.root.get_attribute("data-done")
    for key in ("l", "Enter", "d"):
        panel.canvas.press(key)
    book.run(BREAK)  # the kernel has heard by then what was sent before
    expect(said).to_have_text(over)
    assert panel.root.get_attribute("data-done") == done
    book.page.evaluate(TOP)
    shot("debugger-over-light")

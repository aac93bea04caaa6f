"""The panel as a person uses it: a real Chromium in a real JupyterLab, ranks on threads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import Locator, expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.support.jupyter import Lab, Notebook

pytestmark = pytest.mark.browser

SHOW, WHERE, SLOW, STEP, CLOSE = 1, 2, 3, 4, 5
WHERE_CELL = "print(''.join(map(str, CellMap(run.plan).states(run.standing().stands).flatten())))"
THREADS = [
    """
from dinfer.views.panel.panel import Panel
from dinfer.views.cells import CellMap
from tests.support.doubles import TwinRun
prompt = "The code of Lima is 471. The code of Oslo is 306. What is the code of Lima? The code of Lima is"
run = TwinRun("demo", prompt, world_size=3, chunk_size=4)
""",
    "panel = Panel(run)\npanel",
    WHERE_CELL,
    "run.pace = 1.0",
    "run.pace = 0.0; run.step('chunk');",
    """
import threading
panel.close()
print([t.name for t in threading.enumerate() if "panel" in t.name], run.close())
""",
]


class PanelPage:
    """The panel on a page."""

    def __init__(self, notebook: Notebook, cell: int = SHOW) -> None:
        self.notebook = notebook
        self.root = notebook.output(cell).locator(".dinfer-panel")
        self.canvas = self.root.get_by_label("map of blocks")
        self.done = ""
        """how many actions were done when the last button was pressed"""

    def press(self, action: str) -> None:
        """Press a button, by its data-do."""
        self.done = self.root.get_attribute("data-done") or "0"
        self.root.locator(f'button[data-do="{action}"]').click()

    def call(self, text: str) -> None:
        """Wait until what was pressed is done, the last call reads so and nothing is at work."""
        expect(self.root).not_to_have_attribute("data-done", self.done)
        expect(self.root.locator(".dinfer-last code")).to_have_text(text)
        expect(self.root.locator(".dinfer-working")).to_have_text("")

    def drawn(self) -> str:
        """The cells that the canvas shows, a digit each, as WHERE prints them."""
        cells = bytes.fromhex(self.canvas.get_attribute("data-cells") or "")
        return "".join("0123456789abcdefghijklmnopqrstuv"[cell] for cell in cells)

    def spot(self, layer: int, chunk: int, part: float = 0.5) -> tuple[float, float]:
        """Where a cell is on the canvas; `part` goes from its left edge to its right."""
        shape: dict[str, Any] = json.loads(self.canvas.get_attribute("data-geometry") or "{}")
        return (
            shape["left"] + (chunk + part) * shape["across"],
            shape["top"] + (layer + 0.5) * shape["down"],
        )

    def click(self, layer: int, chunk: int) -> None:
        x, y = self.spot(layer, chunk)
        self.canvas.click(position={"x": x, "y": y})

    def agrees(self) -> str:
        """Wait until the map shows what the kernel says of the ranks; that."""
        said = self.notebook.run(WHERE).strip()
        drawn = bytes(int(digit, 32) for digit in said).hex()
        expect(self.canvas).to_have_attribute("data-cells", drawn)
        return said

    def colour(self, layer: int, chunk: int, part: float) -> list[int]:
        """The colour that a cell has on the canvas."""
        found: list[int] = self.canvas.evaluate(
            """(canvas, [x, y]) => {
                const scale = window.devicePixelRatio;
                return [...canvas.getContext("2d").getImageData(x * scale, y * scale, 1, 1).data.slice(0, 3)];
            }""",
            self.spot(layer, chunk, part),
        )
        return found


def legend_colour(panel: Locator, state: int) -> list[int]:
    """The colour that the legend gives a state."""
    text: str = (
        panel.locator(".dinfer-legend i").nth(state).evaluate("(i) => getComputedStyle(i).backgroundColor")
    )
    return [int(number) for number in text.removeprefix("rgb(").removesuffix(")").split(",")]


def blocks_done(states: str, ranks: int = 3) -> int:
    """How many blocks are on every rank."""
    return sum(states[n : n + ranks] == "4" * ranks for n in range(0, len(states), ranks))


def test_a_person_steps_goes_back_runs_to_a_block_plays_and_pauses(
    notebook: OpenNotebook, shot: Shot
) -> None:
    book = notebook(THREADS)
    book.run(0)
    book.run(SHOW)
    panel = PanelPage(book)
    assert blocks_done(panel.agrees()) == 0
    book.show(SHOW)
    for n in range(3):
        panel.press("step:layer")
        panel.call('run.step("layer")')
        assert blocks_done(panel.agrees()) == n + 1
    panel.press("step_back")
    panel.call('run.step_back("layer")')
    assert blocks_done(panel.agrees()) == 2

    panel.press("run_to")
    expect(panel.root.locator(".dinfer-banner")).to_contain_text("Click a block of the map first")
    panel.click(layer=3, chunk=2)
    expect(panel.root.locator(".dinfer-block")).to_contain_text("block c2 l3")
    panel.press("run_to")
    panel.call("run.run_to(chunk=2, layer=3)")
    states = panel.agrees()
    assert states[(3 * len(states) // 6) :][6:9] == "444"
    assert panel.colour(3, 2, 0.2) == legend_colour(panel.root, 4)
    assert panel.colour(5, 5, 0.2) == legend_colour(panel.root, 0)
    shot("panel-light")
    use_keys(panel)

    book.run(SLOW)  # so that there is time to press pause
    panel.press("resume")
    expect(panel.root).to_have_attribute("data-state", "running")
    panel.press("pause")
    panel.call("run.pause()")
    expect(panel.root).to_have_attribute("data-state", "paused")
    paused = panel.agrees()
    assert 0 < blocks_done(paused) < len(paused) // 3
    assert panel.agrees() == paused

    book.run(STEP)
    panel.call('run.step("chunk")')
    assert blocks_done(panel.agrees()) > blocks_done(paused)
    panel.press("restart")
    panel.call("run.restart()")
    assert blocks_done(panel.agrees()) == 0
    assert book.run(CLOSE).strip() == "[] True"
    expect(panel.root).to_have_count(0)


def use_keys(panel: PanelPage) -> None:
    """With the mouse at rest on a block: arrows, tabs and what moves the run."""
    keys = panel.notebook.page.keyboard
    block = panel.root.locator(".dinfer-block")
    panel.click(layer=3, chunk=2)
    keys.press("ArrowDown")
    expect(block).to_contain_text("block c2 l4 ")
    expect(block).to_contain_text("selected")
    x, y = panel.spot(0, 0)
    panel.canvas.hover(position={"x": x, "y": y})
    expect(block).to_contain_text("block c0 l0 ")
    for tab in ("2", "3"):
        keys.press(tab)
        expect(panel.canvas).to_be_hidden()
        keys.press("1")
        expect(panel.canvas).to_be_visible()
    keys.press("2")
    panel.done = panel.root.get_attribute("data-done") or ""
    keys.press("b")
    panel.call('run.step_back("layer")')
    keys.press("1")


def check_side_bar(panel: PanelPage, shot: Shot) -> None:
    """The buttons are one row beside JupyterLab's side bar, which is open when it starts."""
    page = panel.notebook.page
    wide = panel.root.evaluate("(root) => root.clientWidth")
    drawn = panel.canvas.get_attribute("data-geometry")
    assert drawn
    page.evaluate("window.jupyterapp.shell.expandLeft()")
    page.wait_for_function(
        "(wide) => document.querySelector('.dinfer-panel').clientWidth < wide - 200", arg=wide
    )
    buttons = panel.root.locator(".dinfer-bar > :not(.dinfer-gap)")
    places = buttons.evaluate_all("(all) => all.map((one) => one.getBoundingClientRect().toJSON())")
    assert max(place["top"] for place in places) < min(place["bottom"] for place in places)
    assert max(place["right"] for place in places) <= 1280
    assert buttons.last.evaluate("(one) => parseFloat(getComputedStyle(one).fontSize)") >= 13
    shot("panel-side-bar-light")
    page.evaluate("window.jupyterapp.shell.collapseLeft()")
    page.wait_for_function("(wide) => document.querySelector('.dinfer-panel').clientWidth === wide", arg=wide)
    expect(panel.canvas).to_have_attribute("data-geometry", drawn)  # a click goes to where cells are then


LARGE = [
    """
from dinfer.views.panel.panel import Panel
from dinfer.views.cells import CellMap
from tests.support.doubles import busy_run
run = busy_run(layers=36, chunks=32, ranks=3, waves=46)
run.labels = [f"words of chunk {n} " * 3 for n in range(32)]
run.devices = ["cuda:0", "cuda:1", "cuda:2"]
run.state, run.message = "paused", "breakpoint 1: rank 1 stands before layer c9 l17 (absmax 1843.2 above 1000)"
""",
    "Panel(run)",
    WHERE_CELL,
]


SMALL = """
from dinfer.views.panel.panel import Panel
from dinfer.views.cells import CellMap
from tests.support.doubles import PaperRun, paper_plan
run = PaperRun(paper_plan())
panel = Panel(run)
"""


def check_colours(panel: PanelPage, states: str) -> None:
    """The first cell of each state has the colour that the legend gives it."""
    for state in range(5):
        layer, rest = divmod(states.index(str(state)), 32 * 3)
        chunk, rank = divmod(rest, 3)
        assert panel.colour(layer, chunk, (rank + 0.5) / 3) == legend_colour(panel.root, state), state


def test_a_large_map_is_shown_in_light_and_dark(notebook: OpenNotebook, shot: Shot) -> None:
    book = notebook(LARGE)
    book.run(0)
    book.run(SHOW)
    panel = PanelPage(book)
    states = panel.agrees()
    book.show(SHOW)
    check_side_bar(panel, shot)
    panel.click(layer=17, chunk=9)
    expect(panel.root.locator(".dinfer-block")).to_contain_text("block c9 l17")
    assert set(states) == set("01234")
    check_colours(panel, states)
    box = panel.root.bounding_box()
    assert box
    assert box["height"] < 680
    assert panel.root.evaluate("(root) => root.scrollWidth <= root.clientWidth")
    shot("panel-36x32x3-light")
    book.use_theme("dark")
    expect(panel.root).to_have_class("dinfer-panel dinfer-dark")
    panel.click(layer=10, chunk=20)
    expect(panel.canvas).to_have_attribute("data-selected", "10 20")  # drawn again, in these colours
    check_colours(panel, states)
    shot("panel-36x32x3-dark")


def test_a_press_while_a_cell_runs_is_told_to_wait_and_then_done(notebook: OpenNotebook, lab: Lab) -> None:
    go = lab.home / "go"
    busy = f"""
import pathlib, time
deadline = time.monotonic() + 60
while not pathlib.Path({str(go)!r}).exists() and time.monotonic() < deadline:
    time.sleep(0.01)
"""
    book = notebook([SMALL, "panel", WHERE_CELL, busy, "other = Panel(run); other"])
    book.run(0)
    book.run(SHOW)
    book.run(4)
    panel, other = PanelPage(book), PanelPage(book, 4)
    book.start(3)
    panel.press("step:wave")
    expect(panel.root.locator(".dinfer-banner")).to_contain_text("busy with a cell")
    go.touch()
    panel.call('run.step("wave")')
    expect(panel.root.locator(".dinfer-banner")).to_be_hidden()
    assert "4" in panel.agrees()
    assert other.agrees() == panel.drawn()

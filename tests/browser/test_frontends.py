"""What cells show in Jupyter Notebook 7, and figures in JupyterLab: drawn there, and not as their still pictures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.lab import Lab, open_in_notebook_7
from tests.browser.test_panel import SHOW, SMALL, WHERE_CELL, PanelPage, blocks_done

pytestmark = pytest.mark.browser

FIGURE = """
from dinfer.views.figures.latency import latency
from dinfer.views.figures.shown import Shown
from tests.unit.views.traces import on_paper
Shown(latency(on_paper(4, 3, 2)))
"""


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """As everywhere, but that Notebook 7's own scripts may raise what they like."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(f"{error.message} {error.stack}"))
    yield page
    context.close()
    assert [error for error in errors if "/static/notebook/" not in error] == []


def test_the_panel_steps_in_notebook_7(page: Page, lab: Lab, shot: Shot) -> None:
    book = open_in_notebook_7(page, lab, "seven", [SMALL, "panel", WHERE_CELL, FIGURE])
    book.run(0)
    book.run(SHOW)
    panel = PanelPage(book)
    assert blocks_done(panel.agrees(), ranks=2) == 0
    panel.press("step:chunk")
    panel.call('run.step("chunk")')
    assert blocks_done(panel.agrees(), ranks=2) > 0
    expect(book.output(SHOW).locator(".dinfer-hint")).to_be_hidden()
    book.run(3)
    expect(book.output(3).locator(".js-plotly-plot .main-svg").first).to_be_visible()
    shot("notebook-7")


def test_a_figure_under_a_cell_is_plotly_s(notebook: OpenNotebook) -> None:
    book = notebook([FIGURE])
    book.run(0)
    expect(book.output(0).locator(".js-plotly-plot .main-svg").first).to_be_visible()
    expect(book.output(0).locator(".jp-RenderedSVG")).to_have_count(0)

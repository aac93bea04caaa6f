"""Figures under cells: plotly's own, drawn in the browser, and not their still pictures."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import OpenNotebook

pytestmark = [pytest.mark.browser, pytest.mark.slow]  # test_notebook7 sees one drawn, too

FIGURE = """
from dinfer.views.figures.latency import latency
from dinfer.views.figures.shown import Shown
from tests.unit.views.traces import on_paper
Shown(latency(on_paper(4, 3, 2)))
"""


def test_a_figure_under_a_cell_is_plotly_s(notebook: OpenNotebook) -> None:
    book = notebook([FIGURE])
    book.run(0)
    expect(book.output(0).locator(".js-plotly-plot .main-svg").first).to_be_visible()
    expect(book.output(0).locator(".jp-RenderedSVG")).to_have_count(0)

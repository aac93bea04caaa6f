"""Figures under cells: plotly's own, drawn in the browser, and not their still pictures."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import OpenNotebook, Shot

pytestmark = [pytest.mark.browser, pytest.mark.slow]  # test_notebook7 sees one drawn, too

FIGURE = """
import dinfer
from tests.support.traces import on_paper
on_paper(4, 3, 2).latency()
"""


def test_a_figure_under_a_cell_is_plotly_s(notebook: OpenNotebook) -> None:
    book = notebook([FIGURE])
    book.run(0)
    expect(book.output(0).locator(".js-plotly-plot .main-svg").first).to_be_visible()
    expect(book.output(0).locator(".jp-RenderedSVG")).to_have_count(0)


def test_a_figure_follows_the_theme(notebook: OpenNotebook, shot: Shot) -> None:
    """Its background is the page's; that it was drawn in light, and is drawn anew in dark, changes nothing."""
    book = notebook([FIGURE])
    book.use_theme("light")
    book.run(0)
    book.show(0)
    back = book.output(0).locator(".js-plotly-plot .main-svg").first
    expect(back).to_be_visible()
    shot("figure-light")
    book.use_theme("dark")
    expect(back).to_have_css("background-color", "rgba(0, 0, 0, 0)")
    shot("figure-turned-dark")
    book.run(0)
    expect(back).to_be_visible()
    expect(back).to_have_css("background-color", "rgba(0, 0, 0, 0)")
    shot("figure-dark")
    book.use_theme("light")  # the server keeps what was chosen

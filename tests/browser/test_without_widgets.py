"""A server that lacks what draws widgets: the cell says what to install, and shows the still picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Shot
from tests.browser.test_panel import SMALL
from tests.support.jupyter import Lab, open_notebook

pytestmark = [pytest.mark.browser, pytest.mark.slow]

MANAGER, ANYWIDGET = "@jupyter-widgets/jupyterlab-manager", "anywidget"


@pytest.mark.parametrize("extension", [MANAGER, ANYWIDGET])
def test_the_cell_says_what_to_install(page: Page, shot: Shot, tmp_path: Path, extension: str) -> None:
    lab = Lab(tmp_path, disabled=[extension])
    try:
        book = open_notebook(page, lab, "panel", [SMALL, "panel"])
        book.run(0)
        book.run(1)
        said = book.output(1).get_by_text("pip install ipywidgets anywidget")
        expect(said).to_be_visible()
        expect(book.output(1).locator("svg").first).to_be_visible()
        shot(f"without-{extension.rpartition('/')[2]}")
    finally:
        lab.close()

"""The walkthrough in a real JupyterLab on a real cluster, from its first cell to its report, which opens offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from dinfer.trace.read import read_traces
from tests.browser.conftest import Shot
from tests.support.jupyter import Lab, open_file
from tests.support.offline import open_offline

pytestmark = [pytest.mark.browser, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LOOKED_AT = {"panel", "differ", "exposure", "latency", "sweep", "refused", "verdict"}
"""tags of cells of which a picture is kept"""


@pytest.mark.usefixtures("ipcluster")
@pytest.mark.parametrize("folder", ["", "zh"])
def test_a_person_runs_the_walkthrough_and_opens_its_report(
    page: Page, lab: Lab, browser: Browser, shot: Shot, screenshots: Path, folder: str
) -> None:
    name = f"walkthrough{folder}"
    path = lab.home / "notebooks" / f"{name}.ipynb"
    shutil.copy(NOTEBOOKS / folder / "00-walkthrough.ipynb", path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    book = open_file(page, lab, name)
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        book.run(number)
        tags = LOOKED_AT.intersection(cell["metadata"].get("tags", ()))
        if tags:
            book.show(number)
            shot(f"{name}-{tags.pop()}")
    expect(page.locator(".dinfer-panel canvas").first).to_have_count(1)
    check_report(browser, lab.home / "notebooks" / "report.html", screenshots / f"{name}-report.png")


def check_report(browser: Browser, path: Path, picture: Path) -> None:
    """It opens from disk where every request is blocked; its verdict is seen, and no error is said."""
    [trace] = read_traces(path)
    assert {event.rank for event in trace.events} == {0, 1, 2}
    report = open_offline(browser, path)
    try:
        assert "Rank 2 differs at layer 1" in report.page.locator("#verdict").inner_text()
        report.page.screenshot(path=picture)
        report.read_through()
        report.is_clean()
    finally:
        report.page.context.close()

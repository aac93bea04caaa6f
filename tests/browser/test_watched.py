"""The panel of a watched command in JupyterLab: it follows the command, also while a cell waits for it."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.support.watched import PROGRAMS

pytestmark = pytest.mark.browser

START, SHOW, WAIT, CLOSE = range(4)
CELLS = [
    f"""
import sys, dinfer
program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
watched = dinfer.watch([*program, {str(PROGRAMS / "defects.py")!r}, "both_send_first"])
""",
    "watched.debugger()",
    "try:\n    watched.wait(timeout=120)\nexcept RuntimeError as error:\n    print(error.verdict.kind)",
    "watched.close()",
]


def test_the_panel_follows_a_command_into_its_hang_and_to_its_end(
    notebook: OpenNotebook, page: Page, shot: Shot
) -> None:
    book = notebook(CELLS)
    book.run(START)
    book.run(SHOW)
    panel = page.locator(".dinfer-watched")
    expect(panel.locator(".dinfer-banner")).to_contain_text("runs")
    assert "cycle" in book.run(WAIT)
    banner = panel.locator('[data-severity="error"]')
    expect(banner).to_contain_text("`send -> 1`")
    expect(panel.locator(".dinfer-table tbody tr")).to_have_count(2)
    expect(panel.locator(".dinfer-table")).to_contain_text("dist.send(")
    fold = panel.locator("details").first
    fold.locator("summary").click()
    before = panel.locator(".dinfer-table").inner_html()
    page.wait_for_function(
        "(before) => document.querySelector('.dinfer-table').innerHTML !== before", arg=before
    )
    expect(fold.locator("pre")).to_be_visible()  # a look since has left it unfolded
    page.evaluate("document.querySelector('.dinfer-watched').scrollIntoView()")
    shot("watched-hang-light")
    page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    expect(panel).to_have_class(re.compile("dinfer-dark"))
    colours = (
        "node => [getComputedStyle(node).backgroundColor, getComputedStyle(node.querySelector('text')).fill]"
    )
    back, text = panel.locator(".dinfer-blocks svg").evaluate(colours)
    assert back == "rgba(0, 0, 0, 0)"  # the panel's own
    assert text == panel.evaluate("node => getComputedStyle(node).color")
    shot("watched-hang-dark")
    wide = panel.evaluate("node => [node.scrollWidth, node.clientWidth]")
    assert wide[0] <= wide[1]
    book.run(CLOSE)
    expect(panel.locator(".dinfer-banner")).to_contain_text("ended with status")

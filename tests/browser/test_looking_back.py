"""Time, find and why in a real session: `ipcluster start -n 3`, a notebook, and a person with a mouse."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_panel import PanelPage

pytestmark = [pytest.mark.browser, pytest.mark.cluster, pytest.mark.timeout(300)]

CONNECT, SHOW, HANG, CLOSE = 0, 1, 2, 3
CELLS = [
    """
%load_ext dinfer
import dinfer
session = dinfer.connect(n=3, start=False)
session.load("demo")
prompt = "The code of Lima is 471. The code of Oslo is 306. What is the code of Lima? The code of Lima is"
run = session.prefill(prompt, chunk_size=4)
print(run.wait(60))
""",
    "session.debugger()",
    """
run = session.prefill(prompt, chunk_size=32, schedule="batched", unsafe=True)
display(session.debugger())
try:
    run.wait(60)
except RuntimeError as hung:
    print(type(hung).__name__)
""",
    "session.close()",
]


@pytest.mark.usefixtures("ipcluster")
def test_a_person_looks_back_finds_and_sees_why(notebook: OpenNotebook, shot: Shot) -> None:
    book = notebook(CELLS)
    book.run(CONNECT)
    book.run(SHOW)
    panel = PanelPage(book)
    expect(panel.canvas).to_have_attribute("data-cells", re.compile("^(04)+$"))
    root = panel.root
    root.get_by_role("button", name="time", exact=True).click()
    strip = root.get_by_label("time of the trace")
    expect(strip).to_have_attribute("data-at", "now")
    expect(strip).to_have_attribute("data-rows", "rank 0,rank 1,rank 2")
    strip.press("Home")
    expect(strip).to_have_attribute("data-at", "0")
    expect(root.locator(".dinfer-rank").nth(2)).to_contain_text("0 of")
    now = panel.canvas.get_attribute("data-cells")
    strip.press("PageUp")
    expect(strip).not_to_have_attribute("data-at", "0")
    strip.press("End")
    expect(strip).to_have_attribute("data-at", "now")
    expect(panel.canvas).not_to_have_attribute("data-cells", now or "")
    root.get_by_role("searchbox").fill("lima c4-9")
    hits = root.get_by_label("found", exact=True).get_by_role("button")
    expect(hits.first).to_be_visible()
    root.get_by_role("searchbox").fill("slowest recv kv 0>1")
    expect(hits.first).to_contain_text("kv c")
    hits.first.click()
    expect(root).to_have_attribute("data-past", "yes")
    book.show(SHOW)
    shot("looking-back-lab")
    book.run(HANG)
    why = book.page.locator(".dinfer-why").last
    expect(why.locator("svg path[marker-end]").first).to_be_visible()
    expect(why.locator("details[data-rank]")).to_have_count(3)
    expect(why.locator("a").first).to_have_attribute("href", re.compile("^vscode://file/|/lab/tree/"))
    book.show(HANG)
    shot("why-lab")
    book.run(CLOSE)

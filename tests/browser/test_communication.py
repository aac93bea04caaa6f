"""The live figures of a free run: they are complete once it has ended, and say what they are drawn from."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_debugger import CELLS as DEBUGGER
from tests.browser.test_debugger import CONNECT, SHOW, TOP, Debugger

pytestmark = pytest.mark.browser

RUN, AGAIN, CLOSE = 2, 3, 4
ENDED = "run.resume(); run.wait(timeout=120); print(len(list(run.trace.prefill())))"
CELLS = [
    DEBUGGER[CONNECT].replace('Lima is"', 'Lima is" * 4').replace("chunk_size=4", "chunk_size=2"),
    DEBUGGER[SHOW],
    ENDED,
    f"run.restart(); {ENDED}",
    "session.close()",
]


def test_the_figures_of_a_run_that_has_ended_hold_all_its_events(
    notebook: OpenNotebook, page: Page, shot: Shot
) -> None:
    book = notebook(CELLS)
    book.run(CONNECT)
    book.run(SHOW)
    panel = Debugger(book)
    page.evaluate(TOP)
    panel.open("communication")
    figure, caption = panel.root.locator(".dinfer-figure"), panel.root.locator(".dinfer-caption")
    expect(figure).to_have_attribute("data-events", "0")
    for cell in (RUN, AGAIN):  # a restarted run counts from 0
        events = int(book.run(cell).split()[-1])
        expect(figure).to_have_attribute("data-events", str(events))
        expect(caption).to_have_text(f"{events:,} events of prefill")
    page.evaluate(TOP)
    shot("communication-ended-light")
    book.run(CLOSE)

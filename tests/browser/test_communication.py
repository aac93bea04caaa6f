"""The live figures of a free run: they are complete once it has ended, and say what they are drawn from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, expect
from plotly.offline import get_plotlyjs

from dinfer.views.figures.style import html_config
from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_debugger import CELLS as DEBUGGER
from tests.browser.test_debugger import CONNECT, SHOW, TOP, Debugger
from tests.support.maps import half_done
from tests.support.panel_pages import BarePanel

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


MOVE = """([done, state]) => {
    const shown = window.model.get("shown");
    window.model.set("shown", { ...shown, state, ranks: shown.ranks.map((rank) => ({ ...rank, done })) });
}"""
"""each rank has done so many ops, and the run is in that state"""


def test_a_figure_that_is_older_than_the_state_says_what_it_lacks(page: Page) -> None:
    panel = BarePanel(page, half_done(4, 3, 3))
    panel.root.locator('[data-tab="communication"]').click()
    panel.hear({"plotly": panel.sent("plotly")["view"], "config": html_config()}, get_plotlyjs().encode())
    view, caption = panel.sent("figure")["view"], panel.root.locator(".dinfer-caption")
    page.evaluate(MOVE, [500, "running"])
    expect(caption).to_have_text("catching up: 0 of 1,500 events of prefill")
    figure = {"view": view, "name": "latency", "seen": 1, "caption": "1,500 events of prefill"}
    panel.hear({"figure": {**figure, "events": 1500, "ops": 1500}})
    expect(caption).to_have_text("1,500 events of prefill")
    page.evaluate(MOVE, [501, "done"])
    expect(caption).to_have_text("catching up: 1,500 of 1,503 events of prefill")
    page.evaluate(MOVE, [501, "lost"])
    expect(caption).to_have_text("1,500 events of prefill")  # no more will come


def test_no_figure_of_another_tab_stays_and_an_error_is_said_at_once(page: Page) -> None:
    panel = BarePanel(page, half_done(4, 3, 3))
    panel.root.locator('[data-tab="communication"]').click()
    panel.hear({"plotly": panel.sent("plotly")["view"], "config": html_config()}, get_plotlyjs().encode())
    view, figure = panel.sent("figure")["view"], panel.root.locator(".dinfer-figure")
    drawn = json.dumps({"data": [{"x": [1, 2], "y": [1, 2]}], "layout": {"height": 300}})
    told = {"view": view, "seen": 1, "caption": "9 events of prefill", "events": 9, "ops": 9}
    panel.hear({"figure": {**told, "name": "latency", "json": drawn}})
    expect(figure.locator(".main-svg").first).to_be_visible()
    panel.hear({"figure": {**told, "name": "latency"}})
    expect(figure.locator(".main-svg").first).to_be_visible()  # the one before is better than none
    panel.root.locator('[data-figure="matrix"]').click()
    page.evaluate(MOVE, [500, "running"])  # far ahead of what is drawn
    panel.hear({"figure": {**told, "name": "matrix", "error": "ValueError: no such thing"}})
    expect(panel.root.locator(".dinfer-caption")).to_have_text("ValueError: no such thing")
    expect(figure.locator(".main-svg")).to_have_count(0)


TOKENS = 2700
ON_A_CLUSTER = [
    f"""
import random, dinfer
session = dinfer.connect(n=3, start=False)
session.load("demo")
ids = random.Random(1).choices(range(2, 100), k={TOKENS})
run = session.prefill(ids, chunk_size=16, paused=True)
""",
    DEBUGGER[SHOW],
    ENDED,
    f"run.restart(); {ENDED}",
    "session.close()",
]
OBSERVE = """() => {
  const root = document.querySelector(".dinfer-panel"), figure = root.querySelector(".dinfer-figure");
  const caption = root.querySelector(".dinfer-caption");
  window.samples = [];
  const look = () => window.samples.push([
    performance.now() / 1000, root.dataset.state, Number(figure.dataset.events), caption.textContent,
  ]);
  window.looking = new MutationObserver(look);
  window.looking.observe(root, { attributes: true, subtree: true, characterData: true, childList: true });
}"""
"""keeps what is shown at each change: when, the state of the run, the number of events, the caption"""


@contextmanager
def busy_cores() -> Iterator[None]:
    """Something computes on each core."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.cluster
@pytest.mark.slow  # it takes all cores, which others need that are timed
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ipcluster")
def test_the_figures_of_engines_on_busy_cores_are_complete_and_say_when_they_are_behind(
    notebook: OpenNotebook, page: Page, shot: Shot
) -> None:
    """2,700 tokens by 16: some thousand events, of a run that goes as fast as it can."""
    book = notebook(ON_A_CLUSTER)
    book.run(CONNECT)
    book.run(SHOW)
    panel = Debugger(book)
    page.evaluate(TOP)
    panel.open("communication")
    figure, caption = panel.root.locator(".dinfer-figure"), panel.root.locator(".dinfer-caption")
    expect(figure).to_have_attribute("data-events", "0")
    for cell in (RUN, AGAIN):
        page.evaluate(OBSERVE)
        with busy_cores():
            events = int(book.run(cell).split()[-1])
            assert events > 3000
            expect(panel.root).to_have_attribute("data-state", "done")
            expect(figure).to_have_attribute("data-events", str(events))
            expect(caption).to_contain_text(f"{events:,} events of prefill")
        samples = page.evaluate("window.looking.disconnect(); window.samples")
        check(samples, events)
    page.evaluate(TOP)
    shot("communication-cluster-light")
    book.run(CLOSE)


def check(samples: list[tuple[float, str, int, str]], events: int) -> None:
    """Whoever reads fewer events than there are after the run's end reads that it is so. Whether some are drawn before
    that is the machine's: how long the run takes, and the browser for a figure."""
    last = max((n for n, (_, state, *_) in enumerate(samples) if state == "running"), default=-1)
    after = samples[last + 1 :]
    ended, complete = after[0][0], next(at for at, _, count, _ in after if count == events)
    print(json.dumps({"events": events, "complete after s": round(complete - ended, 3)}))
    for _, _, count, caption in after:
        assert count == events or "catching up" in caption, (count, events, caption)

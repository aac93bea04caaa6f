"""A slow link as a person sees it: in the live plot, while the run goes. Ranks are threads of the kernel."""

from __future__ import annotations

from statistics import median
from typing import TypedDict

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_debugger import CELLS as DEBUGGER
from tests.browser.test_debugger import CONNECT, SHOW, TOP, Debugger

pytestmark = pytest.mark.browser

SLOW, CLOSE = 2, 3
LINK = "0→2"
CELLS = [
    DEBUGGER[CONNECT],
    DEBUGGER[SHOW],
    """
import time
from dinfer.engine import ops

class SlowLink:
    def __init__(self, comm):
        self.comm = comm
    def __getattr__(self, name):
        return getattr(self.comm, name)
    def recv_payload(self, channel, out):
        time.sleep(0.15)
        self.comm.recv_payload(channel, out)

recv = ops.HANDLERS["recv"]
def slow_recv(state, op, comm):
    slowed = state.rank == 2 and op.peer == 0
    return recv(state, op, SlowLink(comm) if slowed else comm)
ops.HANDLERS["recv"] = slow_recv
""",
    'session.close(); ops.HANDLERS["recv"] = recv',
]
WATCH = """() => {
    const figure = document.querySelector(".dinfer-figure"), panel = document.querySelector(".dinfer-panel");
    window.grown = [];
    new MutationObserver(() => {
        if (panel.dataset.state === "running") window.grown.push(Number(figure.dataset.points));
    }).observe(figure, { attributes: true, attributeFilter: ["data-seen"] });
}"""
ALL_SEEN = """() => {
    const ops = [...document.querySelectorAll(".dinfer-rank progress")].reduce((sum, bar) => sum + bar.max, 0);
    return ops > 0 && Number(document.querySelector(".dinfer-figure").dataset.events) === ops;
}"""
DRAWN = """() => {
    const plot = document.querySelector(".js-plotly-plot");
    const wire = plot.data.filter((trace) => (trace.yaxis ?? "y") === "y");
    const dots = [...plot.querySelectorAll(".subplot.xy .scatterlayer .trace")];
    return Object.fromEntries(wire.map((trace, n) => [trace.name, {
        ms: [...(trace.y._inputArray ?? trace.y)],
        tops: [...dots[n].querySelectorAll(".point")].map((dot) => dot.getBoundingClientRect().top),
    }]));
}"""
"""by link, of the upper plot: the milliseconds on the wire, and how far from the page's top their dots are"""


class Link(TypedDict):
    """One link, as drawn."""

    ms: list[float]
    tops: list[float]


def test_a_slow_link_stands_out_while_the_run_goes(notebook: OpenNotebook, page: Page, shot: Shot) -> None:
    book = notebook(CELLS)
    book.run(CONNECT)
    book.run(SHOW)
    book.run(SLOW)
    page.evaluate(TOP)
    panel = Debugger(book)
    panel.open("communication")
    expect(panel.root.locator(".dinfer-fields")).to_contain_text(["nothing has run yet"])
    page.evaluate(WATCH)
    panel.press("resume")
    expect(panel.root).to_have_attribute("data-state", "done")
    page.wait_for_function(ALL_SEEN)
    shot("links-latency-light")

    grown: list[int] = page.evaluate("window.grown")
    assert len(set(grown)) >= 3, grown
    assert grown == sorted(grown)
    drawn: dict[str, Link] = page.evaluate(DRAWN)
    assert {"0→1", "1→2", "2→0"} < drawn.keys()
    assert all(len(link["tops"]) == len(link["ms"]) for link in drawn.values())
    slow = drawn.pop(LINK)
    for name, link in drawn.items():
        assert median(slow["ms"]) > 2 * median(link["ms"]), name
        assert median(slow["tops"]) < median(link["tops"]), name
    book.run(CLOSE)

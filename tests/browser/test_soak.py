"""A panel that stays open while runs come and go: neither page nor kernel grows. DINFER_SOAK_S says how long."""

from __future__ import annotations

import itertools
import json
import os
import time

import pytest
from playwright.sync_api import CDPSession, Locator, Page, expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_debugger import CELLS as DEBUGGER
from tests.browser.test_debugger import CONNECT, SHOW, Debugger
from tests.support.jupyter import Notebook
from tests.support.runs import wait_for

SECONDS = float(os.environ.get("DINFER_SOAK_S", "120"))
"""the first third warms up; what is there then is compared with what is there at the end"""
pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(4 * SECONDS + 120)]

START, STOP = 2, 3
CELLS = [
    DEBUGGER[CONNECT],
    DEBUGGER[SHOW],
    """
import gc, json, psutil, threading
rounds, between, ending = 0, threading.Lock(), threading.Event()

def again():
    global rounds
    while not ending.is_set():
        with between:
            run.restart()
            run.resume()
            run.wait(timeout=60)
            rounds += 1
        ending.wait(0.01)

looping = threading.Thread(target=again)
looping.start()
""",
    "ending.set(); looping.join(); session.close()",
]
MEASURE = """
with between:
    gc.collect()
    print(json.dumps({
        "rounds": rounds,
        "MB of the kernel": psutil.Process().memory_info().rss / 1e6,
        "threads": sum("panel" not in thread.name for thread in threading.enumerate()),
        "objects": len(gc.get_objects()),
    }))
"""
ASK = """async (code) => {
    const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
    const future = kernel.requestExecute({ code, store_history: false });
    let said = "";
    future.onIOPub = ({ header, content }) => { if (header.msg_type === "stream") said += content.text; };
    await future.done;
    return said;
}"""
MAY_GROW = {
    "MB of the kernel": 25.0,
    "threads": 0,
    "objects": 3000,
    "MB of the page": 8.0,
    "nodes": 500,
    "listeners": 100,
}
"""for what other things need: caches of the kernel and of JupyterLab"""
RUN = 285
"""events of one run"""
FIGURES = ("latency", "distribution", "matrix", "gantt", "exposure")


def measure(book: Notebook, devtools: CDPSession) -> dict[str, float]:
    """What page and kernel hold, after all garbage is collected. The kernel is asked past the notebook's cells, as
    JupyterLab keeps something of each cell that has run."""
    found: dict[str, float] = json.loads(book.page.evaluate(ASK, MEASURE))
    devtools.send("HeapProfiler.collectGarbage")
    metrics = {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}
    page = {"MB of the page": metrics["JSHeapUsedSize"] / 1e6, "nodes": metrics["Nodes"]}
    return {**found, **page, "listeners": metrics["JSEventListeners"]}


def wait_for_more(figure: Locator) -> None:
    """Until a run more is drawn."""
    seen = int(figure.get_attribute("data-seen") or 0)
    wait_for(lambda: int(figure.get_attribute("data-seen") or 0) > seen + RUN, "more is drawn")


def test_page_and_kernel_do_not_grow_while_runs_come_and_go(
    notebook: OpenNotebook, page: Page, shot: Shot
) -> None:
    book = notebook(CELLS, fresh=True)
    book.run(CONNECT)
    book.run(SHOW)
    panel = Debugger(book)
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")
    devtools.send("HeapProfiler.enable")
    panel.open("communication")
    book.run(START)
    figure = panel.root.locator(".dinfer-figure")
    began, taken = time.monotonic(), list[dict[str, float]]()
    for part in (1 / 3, 2 / 3, 1):
        for name in itertools.cycle(FIGURES):
            panel.root.locator(f'[data-figure="{name}"]').click()
            expect(figure).to_have_attribute("data-name", name)
            wait_for_more(figure)
            if name == FIGURES[-1] and time.monotonic() - began > part * SECONDS:
                break
        taken.append(measure(book, devtools))
    shot("soak-latency-light")
    assert taken[-1]["rounds"] > taken[0]["rounds"] > 0
    print(*taken, sep="\n")
    for name, most in MAY_GROW.items():
        assert taken[-1][name] - taken[0][name] <= most, (name, taken)
    book.run(STOP)

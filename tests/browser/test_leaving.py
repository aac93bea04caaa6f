"""What is left when a person goes: a panel that is closed, a kernel that is restarted with a panel open."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_debugger import ALWAYS, CONNECT, SHOW, WHERE, Debugger
from tests.browser.test_debugger import CELLS as DEBUGGER
from tests.browser.test_session import CELLS as SESSION
from tests.cluster.test_leaks import Held, check_held, held
from tests.support.jupyter import Notebook

pytestmark = pytest.mark.browser

BEFORE, LEAVE, AFTER = 3, 4, 5
NAMES = """sorted(
    thread.name
    for thread in threading.enumerate()
    if type(thread).__name__ != "GarbageCollectorThread" and not thread.name.startswith("subshell")
)"""
"""of all threads but those that a process gets and keeps: pyzmq's with its first large message, the kernel's for the
messages of widgets with its first widget"""
CLOSING = [
    DEBUGGER[CONNECT],
    "panel = session.debugger()\npanel",
    DEBUGGER[WHERE],
    # What looks at a rank has a thread of its own, from the first look on, as long as the session.
    f"import threading\nrun.sha256()\nbefore = {NAMES}",
    f"""
import time
panel.close()
deadline = time.monotonic() + 20
while (after := {NAMES}) != before and time.monotonic() < deadline:
    time.sleep(0.01)
print(after == before, set(after) - set(before))
""",
    f"""
session.close()
deadline = time.monotonic() + 20
while (left := [name for name in {NAMES} if "dinfer" in name or "rank" in name]) and time.monotonic() < deadline:
    time.sleep(0.01)
print(left)
""",
]


def test_a_panel_that_is_closed_leaves_no_thread(notebook: OpenNotebook) -> None:
    book = notebook(CLOSING, fresh=True)
    book.run(CONNECT)
    book.run(BEFORE)
    book.run(SHOW)
    panel = Debugger(book)
    panel.press("step:layer")
    panel.call('run.step("layer")')
    panel.open("KV")
    expect(panel.root.locator(".dinfer-scale")).to_contain_text("rank 0")
    panel.open("communication")
    expect(panel.root.locator(".dinfer-figure")).to_have_attribute("data-name", "latency")
    panel.press("resume")
    assert book.run(LEAVE).strip() == "True set()"
    expect(panel.root).to_have_count(0)
    assert book.run(AFTER).strip() == "[]"


PIDS = 3
RESTARTED = [*SESSION[:3], 'print(*session.ranks.cluster.call(None, "os:getpid"))']
TIMES = 3


def restart(book: Notebook) -> None:
    """Restart the kernel, as a person does."""
    page = book.page
    page.evaluate("void window.jupyterapp.commands.execute('notebook:restart-kernel')")
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.wait_for_function(
        "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'"
    )


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(450)
@pytest.mark.usefixtures("ipcluster")
def test_a_kernel_is_restarted_with_a_panel_open_and_joins_its_engines_again(
    notebook: OpenNotebook, shot: Shot, console_errors: list[str]
) -> None:
    book = notebook(RESTARTED, fresh=True)
    base: list[Held] = []
    for number in range(TIMES):
        book.run(CONNECT)
        book.run(SHOW)
        panel = Debugger(book)
        panel.press("step:layer")
        panel.call('run.step("layer")')
        shown = panel.agrees()
        x, y = panel.spot(2, 2)
        panel.canvas.dblclick(position={"x": x, "y": y})
        expect(panel.root.get_by_text("✎")).to_be_enabled()
        engines = [int(pid) for pid in book.run(PIDS).split()]
        if number < 2:  # an engine's first group is the first that it has ever had
            base = [held(pid) for pid in engines]
        else:
            check_held(engines, base)
        panel.open("communication")
        expect(panel.root.locator(".dinfer-figure")).to_have_attribute("data-name", "latency")
        panel.open("map")
        restart(book)
        expect(panel.root.locator(".dinfer-banner")).to_contain_text("disconnected: the kernel was restarted")
        assert panel.live() == ALWAYS
        panel.canvas.press("l")
        panel.open("KV")
        expect(panel.root.locator(".dinfer-verdict")).to_contain_text(
            "disconnected: the kernel was restarted"
        )
        panel.open("map")
        panel.click(layer=3, chunk=1)
        expect(panel.root.locator(".dinfer-block")).to_contain_text("block c1 l3")
        assert panel.drawn() == shown
    book.show(SHOW)
    shot("leaving-restarted-light")
    assert not console_errors

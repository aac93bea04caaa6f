"""The panel of a real session: `ipcluster start -n 3`, a notebook, and a person who clicks."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_panel import PanelPage, blocks_done

pytestmark = [pytest.mark.browser, pytest.mark.cluster, pytest.mark.timeout(300)]

CONNECT, SHOW, WHERE, STEP, CLOSE = 0, 1, 2, 3, 4
CELLS = [
    """
%load_ext dinfer
import dinfer
session = dinfer.connect(n=3, start=False)
session.load("demo")
prompt = "The code of Lima is 471. The code of Oslo is 306. What is the code of Lima? The code of Lima is"
run = session.prefill(prompt, chunk_size=4, paused=True)
""",
    "session.debugger()",
    """
from dinfer.views.cells import CellMap
print(''.join(map(str, CellMap(run.plan).states(run.standing().stands).flatten())))
""",
    'print(run.step("wave"))',
    "session.close()",
]


@pytest.mark.usefixtures("ipcluster")
def test_a_person_steps_three_ranks_of_a_cluster_by_their_panel(notebook: OpenNotebook, shot: Shot) -> None:
    book = notebook(CELLS)
    book.run(CONNECT)
    book.run(SHOW)
    panel = PanelPage(book)
    panel.agrees()
    book.show(SHOW)
    for n in range(3):
        panel.press("step:layer")
        panel.call('run.step("layer")')
        assert blocks_done(panel.agrees()) == n + 1
    panel.press("step_back")
    panel.call('run.step_back("layer")')
    assert blocks_done(panel.agrees()) == 2
    panel.click(layer=3, chunk=1)
    panel.press("run_to")
    panel.call("run.run_to(chunk=1, layer=3)")
    after = blocks_done(panel.agrees())
    assert after > 2
    shot("session-light")
    book.run(STEP)
    panel.call('run.step("wave")')
    assert blocks_done(panel.agrees()) > after
    panel.press("resume")
    panel.press("pause")
    panel.call("run.pause()")
    panel.agrees()
    book.run(CLOSE)
    expect(panel.root.locator(".dinfer-banner")).to_contain_text("the session is closed")

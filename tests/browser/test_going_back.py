"""Going back, undo and play as a person has them in the panel; and the keys of the form of breakpoints."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_debugger import CELLS as DEBUGGER
from tests.browser.test_debugger import CONNECT, SHOW, TOP, WHERE, Debugger

pytestmark = pytest.mark.browser

PLAYED, WAIT, CLOSE = 3, 4, 5
CELLS = [
    DEBUGGER[CONNECT],
    DEBUGGER[SHOW],
    DEBUGGER[WHERE],
    'run.play("layer", per_second=0.01); print("at once")',
    "print(run.wait().state)",
    "session.close()",
]


def test_a_person_goes_back_undoes_plays_and_pauses(notebook: OpenNotebook, shot: Shot) -> None:
    book = notebook(CELLS)
    book.run(CONNECT)
    book.run(SHOW)
    panel = Debugger(book)
    book.page.evaluate(TOP)
    banner = panel.root.locator(".dinfer-banner")
    back, state = panel.root.locator("[data-do=step_back]"), panel.root.locator(".dinfer-state")
    pace = panel.root.get_by_label("speed of play")

    panel.key("c", 'run.step("chunk")')
    expect(back).to_have_text("◀ chunk")
    chunk = panel.agrees()
    panel.key("l", 'run.step("layer")')
    expect(back).to_have_text("◀ layer")
    expect(panel.root.locator(".dinfer-unit")).to_have_text("layer")
    expect(pace.locator("option").nth(2)).to_have_text("2 layers/s")
    layer = panel.agrees()
    assert layer.count("4") == chunk.count("4") + 3
    panel.key("b", 'run.step_back("layer")')
    assert panel.agrees().count("4") == layer.count("4") - 3
    panel.key("u", "run.undo()")
    expect(banner).to_contain_text('undid run.step_back("layer"): did c')
    assert panel.agrees() == layer
    shot("going-back-undo-light")
    panel.press("undo")
    panel.call("run.undo()")
    panel.press("undo")
    panel.call("run.undo()")
    assert set(panel.agrees()) == {"0"}
    panel.press("undo")
    panel.call("run.undo()")
    expect(banner).to_contain_text("nothing to undo")

    assert book.run(PLAYED).strip() == "at once"
    expect(state).to_have_text("playing")
    expect(panel.root.locator(".dinfer-working")).to_have_text('at work: run.play("layer", per_second=0.01)')
    shot("going-back-playing-light")
    panel.press("pause")
    expect(state).to_have_text("paused")
    assert book.run(WAIT).strip() == "paused"
    pace.select_option("10")
    panel.press("resume")
    panel.press("step:wave")  # ends the play
    panel.call('run.step("wave")')
    expect(state).to_have_text("paused")
    expect(pace).to_have_value("10")

    pace.select_option("")
    panel.press("resume")
    expect(state).to_have_text("done")
    for what in ("step:layer", "resume"):
        panel.press(what)
        expect(banner).to_contain_text("nothing to do: the run stands at the end of prefill")
    shot("going-back-end-light")
    book.use_theme("dark")
    shot("going-back-end-dark")
    book.use_theme("light")
    book.run(CLOSE)


def test_enter_sets_a_breakpoint_and_escape_leaves_the_form(notebook: OpenNotebook, shot: Shot) -> None:
    book = notebook(CELLS)
    book.run(CONNECT)
    book.run(SHOW)
    panel = Debugger(book)
    book.page.evaluate(TOP)
    form, keys = panel.root.locator(".dinfer-stops"), book.page.keyboard
    form.locator("summary").click()
    cells = book.page.locator(".jp-Notebook .jp-Cell").count()
    form.locator('input[name="layer"]').click()
    keys.type("2")
    keys.press("Enter")
    expect(form.locator(".dinfer-list > div")).to_have_text(["#1: after layer 2✎×"])
    expect(form.locator('input[name="layer"]')).to_have_value("")
    expect(form.locator('input[name="layer"]')).to_be_focused()
    form.get_by_label("change breakpoint 1").click()
    keys.type("nan")
    keys.press("Escape")
    expect(form.locator("form button")).to_have_text("add")
    expect(form.locator('input[name="when"]')).to_have_value("")
    expect(panel.root).to_be_focused()
    keys.press("w")  # the panel's key again
    panel.call('run.step("wave")')
    keys.press("u")
    panel.call("run.undo()")
    keys.press("u")
    expect(form.locator(".dinfer-list > div")).to_have_count(0)
    expect(panel.root.locator(".dinfer-banner")).to_contain_text("undid run.break_at(layer=2): removed #1")
    assert book.page.locator(".jp-Notebook .jp-Cell").count() == cells
    shot("going-back-form-light")
    book.run(CLOSE)

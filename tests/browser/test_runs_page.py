"""The page of runs, every verb from the panel with its call, and the log that makes a run again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page

import dinfer
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.browser.conftest import Shot
from tests.support.linked_panel import LinkedPanel
from tests.support.runs import DEADLINE_S

pytestmark = pytest.mark.browser

PROMPT = "The code of Lima is 471. The code of Oslo is 306. What is the code of Lima? The code of Lima is"


@pytest.fixture
def run(session: Session) -> Run:
    return session.prefill(PROMPT, chunk_size=8, max_new_tokens=4, paused=True)


@pytest.fixture
def panel(page: Page, run: Run) -> Iterator[LinkedPanel]:
    made = LinkedPanel(page, run)
    yield made
    made.close()


def finished(session: Session, **parameters: object) -> Run:
    run = session.prefill(PROMPT, chunk_size=8, max_new_tokens=4, **parameters)  # type: ignore[arg-type]
    run.wait(DEADLINE_S)
    return run


def fill(panel: LinkedPanel, verb: str, **fields: str) -> None:
    """Open the form of a verb and fill it in."""
    panel.root.locator(f"[data-form={verb}]").click()
    form = panel.root.locator(".dinfer-verb")
    for name, value in fields.items():
        field = form.locator(f"[name={name}]")
        kind = field.evaluate("(field) => field.type")
        if kind == "select-one":
            field.select_option(value)
        elif kind == "checkbox":
            field.set_checked(value == "yes")
        else:
            field.fill(value)


def call_shown(panel: LinkedPanel) -> str:
    return panel.root.locator(".dinfer-verb .dinfer-call code").inner_text()


def submit(panel: LinkedPanel, call: str) -> None:
    """The form shows this call; Enter makes it."""
    assert call_shown(panel) == call
    panel.root.locator(".dinfer-verb button[type=submit]").click()
    panel.called(call)


# -- every verb, with its call


def test_verbs_are_made_from_forms_that_show_their_call(
    panel: LinkedPanel, run: Run, tmp_path: Path, shot: Shot
) -> None:
    fill(panel, "inject", kind="bitflip", rank="2", layer="3", chunk="1", token="9", where="memory")
    submit(panel, 'run.inject("bitflip", rank=2, layer=3, chunk=1, token=9, where="memory")')
    assert [one.fault.layer for one in run.faults] == [3]
    fill(panel, "decode", max_new_tokens="3")
    submit(panel, "run.decode(max_new_tokens=3)")
    assert len(run.tokens) == 3
    panel.says(panel.root.locator(".dinfer-text"), run.text.strip())
    panel.root.get_by_role("button", name="token ▶").click()
    panel.called('run.step("token")')
    panel.root.get_by_role("button", name="◀ token").click()
    panel.called('run.step_back("token")')
    assert len(run.tokens) == 3
    shot("verbs-decode-light")
    fill(panel, "compare")
    submit(panel, 'run.compare("reference")')
    panel.says(panel.root.locator(".dinfer-banner"), "rank 2")
    folder, page = str(tmp_path / "kept"), str(tmp_path / "report.html")
    fill(panel, "save", folder=folder, hidden="no")
    submit(panel, f'run.save("{folder}", hidden=False)')
    assert dinfer.open(folder).plan.id == run.plan.id
    fill(panel, "report", path=page)
    submit(panel, f'run.report("{page}")')
    assert Path(page).is_file()
    panel.root.get_by_role("button", name="recover").click()
    panel.called("session.recover()")


def test_undo_says_what_it_undoes(panel: LinkedPanel, run: Run) -> None:
    run.step("wave")
    run.break_at(layer=4)
    panel.wait(lambda: panel.panel.log["undo"] == "run.break_at(layer=4)", "the panel knows")
    undo = panel.root.locator("[data-do=undo]")
    assert "run.undo(): undo run.break_at(layer=4);" in (undo.get_attribute("title") or "")
    undo.click()
    panel.called("run.undo()")
    assert not run.breakpoints
    undo.click()
    panel.wait(lambda: not any(map(any, (stand.positions for stand in run.standing().stands))), "undone")


def test_what_a_fault_does_not_take_is_not_asked(panel: LinkedPanel, shot: Shot) -> None:
    fill(panel, "inject", kind="swap_kv", layer="1", chunk="0")
    assert panel.root.locator(".dinfer-verb [data-name=bit]").is_hidden()
    assert call_shown(panel) == 'run.inject("swap_kv", layer=1, chunk=0)'
    shot("verbs-inject-light")
    panel.root.locator(".dinfer-verb [name=layer]").press("Escape")
    assert panel.root.locator(".dinfer-verb").is_hidden()


def test_what_is_refused_is_said_and_logged(panel: LinkedPanel, run: Run) -> None:
    fill(panel, "decode", max_new_tokens="0")
    panel.root.locator(".dinfer-verb [name=max_new_tokens]").press("Enter")
    panel.says(
        panel.root.locator(".dinfer-banner"), "max_new_tokens is 0; it must be a whole number, at least 1."
    )
    panel.says(panel.root.locator(".dinfer-log .dinfer-refused"), "max_new_tokens is 0")
    assert not run.tokens


def test_breakpoints_are_disabled_and_count_their_hits(panel: LinkedPanel, run: Run) -> None:
    run.break_at(layer=2, chunk=1)
    run.break_at(layer=4, chunk=1)
    run.resume()
    run.wait(DEADLINE_S)
    listed = panel.root.locator(".dinfer-stops .dinfer-list > div")
    panel.says(listed.first, "1 hit")
    listed.last.get_by_role("checkbox").uncheck()
    panel.called("run.breakpoints.disable(2)")
    run.resume()
    run.wait(DEADLINE_S)
    assert run.standing().state == "done", "it passed the disabled one"
    panel.says(listed.last, "(disabled)")
    listed.last.get_by_role("checkbox").check()
    panel.called("run.breakpoints.enable(2)")
    assert run.breakpoints[2].enabled


# -- the log


def test_the_log_is_copied_as_a_cell_and_saved_as_a_notebook(
    panel: LinkedPanel, run: Run, tmp_path: Path
) -> None:
    panel.root.locator("[data-do='step:wave']").click()
    panel.called('run.step("wave")')
    run.run_to(chunk=1, layer=2)
    panel.root.locator(".dinfer-log summary").click()
    panel.says(panel.root.locator(".dinfer-log li code"), "run.run_to(chunk=1, layer=2)")
    clipboard = "{ value: { writeText: async (text) => { window.copied = text; } } }"
    panel.page.evaluate(f"Object.defineProperty(navigator, 'clipboard', {clipboard})")
    panel.root.get_by_role("button", name="copy as a cell").click()
    panel.wait(lambda: panel.page.evaluate("window.copied ?? ''"), "it is copied")
    assert panel.page.evaluate("window.copied") == run.calls.cell()
    assert run.calls.cell().splitlines()[-2:] == ['run.step("wave")', "run.run_to(chunk=1, layer=2)"]
    path = tmp_path / "again.ipynb"
    panel.root.get_by_label("the notebook's file").fill(str(path))
    panel.root.get_by_role("button", name="save as a notebook").click()
    panel.wait(path.is_file, "it is saved")
    book = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    assert 'run.step("wave")' in [cell.source for cell in book.cells]


# -- runs


def test_without_a_kernel_no_runs_are_compared_and_no_call_has_no_label(session: Session, page: Page) -> None:
    finished(session)
    panel = LinkedPanel(page, session.prefill(PROMPT, chunk_size=8, paused=True))
    try:
        label = panel.root.get_by_text("last call", exact=True)
        assert label.is_visible() == bool(panel.panel.shown["call"])
        page.evaluate("window.model.set('shown', { ...window.model.get('shown'), call: '' })")
        assert label.is_hidden()
        page.evaluate("window.model.set('shown', { ...window.model.get('shown'), call: 'run.pause()' })")
        assert label.is_visible()
        panel.root.locator("[data-tab=runs]").click()
        panel.says(panel.root.locator(".dinfer-runs tbody tr"), "(here)")
        compare = panel.root.get_by_role("button", name="compare", exact=True)
        compare.click()  # is asked, and never answered
        page.evaluate("window.lose()")
        assert compare.is_disabled()
        assert panel.root.locator(".dinfer-runs input").first.is_disabled()
        assert "comparing" not in panel.root.locator(".dinfer-sides").inner_text()
    finally:
        panel.close()


def test_runs_are_listed_and_two_are_compared(session: Session, page: Page, shot: Shot) -> None:
    broken = session.prefill(PROMPT, chunk_size=8, max_new_tokens=4, paused=True)
    broken.inject("bitflip", rank=2, layer=3, chunk=1, token=9)
    broken.decode(4)
    other = finished(session, sync_strategy="ring")
    other.decode(4)
    panel = LinkedPanel(page, other)
    try:
        panel.root.locator("[data-tab=runs]").click()
        rows = panel.root.locator(".dinfer-runs tbody tr")
        panel.says(rows, f"{other.name} (here)")
        panel.says(rows, "digests, ")
        assert "1 fault armed" in " ".join(rows.all_text_contents())
        chosen = panel.root.locator(".dinfer-runs input:checked")
        assert [one.get_attribute("aria-label") for one in chosen.all()] == [
            f"compare {broken.name}",
            f"compare {other.name}",
        ]
        panel.root.get_by_role("button", name="compare", exact=True).click()
        sides = panel.root.locator(".dinfer-sides")
        panel.says(sides, "KV differs, first at block c1 l3")
        panel.says(sides, "ring")
        call = panel.root.locator(".dinfer-page:not([hidden]) .dinfer-call code")
        assert call.inner_text() == f'session.runs.compare("{broken.name}", "{other.name}")'
        shot("runs-compared-light")
        panel.root.evaluate("(root) => root.classList.add('dinfer-dark')")
        shot("runs-compared-dark")
    finally:
        panel.close()


def test_a_run_that_is_over_keeps_its_list(session: Session, panel: LinkedPanel, run: Run) -> None:
    run.step("chunk")
    finished(session)
    panel.says(panel.root.locator(".dinfer-banner"), "this run is over")
    panel.root.locator("[data-tab=runs]").click()
    panel.says(panel.root.locator(".dinfer-runs tbody tr"), f"{run.name} (here)")
    assert panel.root.locator("[data-form=decode]").is_disabled()
    panel.root.locator(".dinfer-log summary").click()
    assert panel.root.get_by_role("button", name="copy as a cell").is_enabled()

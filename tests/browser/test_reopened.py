"""A notebook that is saved while its panel is live, closed, and opened again: the still picture, and never an error."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_debugger import CELLS, CONNECT, SHOW, Debugger
from tests.browser.test_figures import FIGURE
from tests.support.jupyter import Lab, Notebook, open_file

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

AGAIN, DRAW, SWEEP = 2, 3, 4
BOOK = [
    *CELLS[: SHOW + 1],
    "twice = session.debugger(); display(twice); twice",
    FIGURE,
    "session.sweep('What is the code of Lima?', chunk_size=[4, 8])",
]
STILL = "Run the cell again for a live panel"
VIEW = "application/vnd.jupyter.widget-view+json"
SAVE_STATE = "@jupyter-widgets/jupyterlab-manager:saveWidgetState"


@pytest.fixture(scope="module", params=["jupyterlab", pytest.param("notebook", marks=pytest.mark.slow)])
def lab(request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The JupyterLab of all tests, then a Notebook 7."""
    if request.param == lab.app:
        yield lab
        return
    made = Lab(tmp_path_factory.mktemp(request.param), request.param)
    yield made
    made.close()


ELSEWHERE = {"name": "elsewhere", "display_name": "Elsewhere", "language": "elsewhere"}
SAVE = """async (kernel) => {
    const app = window.jupyterapp, { context } = app.shell.currentWidget;
    if (kernel) {
        context.model.setMetadata("kernelspec", kernel);
        context.model.setMetadata("language_info", { name: kernel.language });
    }
    await context.save();
}"""
CLOSE_TAB = """async () => {
    const widget = window.jupyterapp.shell.currentWidget, { localPath, sessionContext } = widget.context;
    await sessionContext.shutdown();
    widget.close();
    return localPath;
}"""
OPEN_TAB = """async (path) => {
    const app = window.jupyterapp;
    const { context } = await app.commands.execute("docmanager:open", { path });
    await context.sessionContext.ready;
}"""


def end_kernel(page: Page, lab: Lab, name: str) -> None:
    """Leave the notebook, and end its kernel."""
    page.goto("about:blank")
    sessions = page.request.get(f"{lab.url()}/api/sessions?token={lab.token}").json()
    for session in [one for one in sessions if one["path"] == f"{name}.ipynb"]:
        answer = page.request.delete(f"{lab.url()}/api/sessions/{session['id']}?token={lab.token}")
        assert answer.ok


def save(book: Notebook, kernel: dict[str, str] | None = None) -> None:
    """Save the notebook; `kernel`: the kernel that its file names."""
    book.page.evaluate(SAVE, kernel)


def check_still(book: Notebook) -> None:
    """All panels are still pictures, and what is no panel is as it was."""
    for cell, shown in ((SHOW, 1), (AGAIN, 2)):
        stills = book.output(cell).get_by_text(STILL)
        expect(stills).to_have_count(shown)
        for n in range(shown):
            expect(stills.nth(n)).to_be_visible()
        expect(book.output(cell).locator("svg").first).to_be_visible()
        expect(book.output(cell).locator(".dinfer-panel")).to_have_count(0)
    expect(book.output(DRAW).locator(".main-svg, img").first).to_be_visible()
    expect(book.output(CONNECT)).to_contain_text("rank 0: 100%")
    expect(book.output(SWEEP)).to_contain_text("runs: 100%")
    expect(book.page.get_by_text("Error displaying widget")).to_have_count(0)
    expect(book.page.get_by_text("Loading widget")).to_have_count(0)


def name_of(book: Notebook) -> str:
    """The name under which the notebook is open."""
    path: str = book.page.evaluate("window.jupyterapp.shell.currentWidget.context.localPath")
    return path.removesuffix(".ipynb")


def step(book: Notebook) -> None:
    """Take a step with the live panel."""
    panel = Debugger(book)
    panel.press("step:layer")
    panel.call('run.step("layer")')
    expect(book.output(SHOW).get_by_text(STILL)).to_be_hidden()


def test_a_saved_notebook_shows_still_pictures_when_it_is_opened_again(
    notebook: OpenNotebook, page: Page, lab: Lab, shot: Shot
) -> None:
    book = notebook(BOOK, fresh=True)
    for cell in (CONNECT, SHOW, AGAIN, DRAW):
        book.run(cell)
    step(book)
    expect(book.output(AGAIN).locator(".dinfer-panel")).to_have_count(2)
    book.run(SWEEP)
    name = name_of(book)
    save(book)
    saved = json.loads((lab.home / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in saved["cells"] for output in cell["outputs"]]
    assert not any(VIEW in output.get("data", {}) for output in outputs)

    book = open_file(page, lab, name)  # while its kernel runs, its panels are live again
    expect(book.output(SHOW).locator(".dinfer-panel")).to_have_attribute("data-done", "1")
    expect(book.output(AGAIN).locator(".dinfer-panel")).to_have_count(2)

    end_kernel(page, lab, name)
    book = open_file(page, lab, name)
    check_still(book)
    book.show(SHOW)
    shot(f"reopened-new-kernel-{lab.app}")
    book.run(CONNECT)
    book.run(SHOW)
    step(book)

    save(book, ELSEWHERE)
    end_kernel(page, lab, name)
    page.goto(lab.address(name))
    page.locator(".jp-Dialog .jp-mod-reject").click()  # "No Kernel"
    expect(page.locator(".jp-Dialog")).to_have_count(0)
    check_still(Notebook(page))
    shot(f"reopened-no-kernel-{lab.app}")


@pytest.mark.slow
def test_models_that_were_saved_with_the_notebook_are_not_live(
    notebook: OpenNotebook, page: Page, lab: Lab
) -> None:
    book = notebook([*BOOK, "import ipywidgets\nipywidgets.Label('a saved widget')"], fresh=True)
    for cell in range(len(BOOK) + 1):
        book.run(cell)
    page.evaluate("(command) => window.jupyterapp.commands.execute(command)", SAVE_STATE)
    save(book)
    page.evaluate("(command) => window.jupyterapp.commands.execute(command)", SAVE_STATE)
    name = name_of(book)
    end_kernel(page, lab, name)
    book = open_file(page, lab, name)
    expect(book.output(len(BOOK)).get_by_text("a saved widget")).to_be_visible()  # so the models are there
    check_still(book)


@pytest.mark.slow
def test_a_tab_that_is_closed_and_opened_again(notebook: OpenNotebook, page: Page, lab: Lab) -> None:
    """The page is the same, and still has the models of the panels."""
    if lab.app == "notebook":
        pytest.skip("has a page for each notebook, and no tabs")
    book = notebook(BOOK, fresh=True)
    for cell in range(len(BOOK)):
        book.run(cell)
    save(book)
    path = page.evaluate(CLOSE_TAB)
    page.evaluate(OPEN_TAB, path)
    check_still(book)
    book.run(CONNECT)
    book.run(SHOW)
    step(book)

"""The panel in Notebook 7: the same server and widgets as JupyterLab, another page around them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenNotebook, Shot
from tests.browser.test_debugger import CELLS, CLOSE, CONNECT, SHOW, TOP, Debugger
from tests.browser.test_figures import FIGURE
from tests.support.jupyter import Lab

pytestmark = pytest.mark.browser

SAY_WHERE, DRAW = len(CELLS), len(CELLS) + 1


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A Notebook 7 server, in JupyterLab's place."""
    made = Lab(tmp_path_factory.mktemp("notebook"), "notebook")
    yield made
    made.close()


def test_a_person_steps_and_looks_in_notebook_7(
    notebook: OpenNotebook, page: Page, shot: Shot, console_errors: list[str]
) -> None:
    book = notebook([*CELLS, "print(run.where())", FIGURE])
    book.run(CONNECT)
    book.run(SHOW)
    panel = Debugger(book)
    assert set(panel.agrees()) == {"0"}
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    panel.press("step:layer")
    panel.call('run.step("layer")')
    after = panel.agrees()
    assert after.startswith("444")
    where = book.run(SAY_WHERE).splitlines()
    ranks = panel.root.locator(".dinfer-rank .dinfer-where")
    for rank, text in enumerate(ranks.all_inner_texts()):
        assert any(line.startswith(f"rank {rank}") and text in line for line in where), (text, where)
    panel.key("w", 'run.step("wave")')
    assert panel.agrees() != after
    panel.key("b", 'run.step_back("wave")')  # a key of Notebook 7's too: it would add a cell
    assert panel.agrees() == after
    panel.canvas.press("a")  # and so is this one, which the panel has no use for
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells
    page.evaluate(TOP)
    shot("notebook7-map-light")

    panel.open("KV")
    expect(panel.root.locator(".dinfer-scale")).to_contain_text("ranks 0 and 2 both hold 4 tokens")
    shot("notebook7-kv-light")
    panel.open("communication")
    figure = panel.root.locator(".dinfer-figure")
    expect(figure).to_have_attribute("data-name", "latency")
    expect(figure.locator(".point").first).to_be_attached()
    shot("notebook7-latency-light")
    book.run(DRAW)
    expect(book.output(DRAW).locator(".js-plotly-plot .main-svg").first).to_be_visible()
    book.use_theme("dark")
    expect(figure.locator(".main-svg").first).to_have_css("background-color", "rgb(17, 17, 17)")
    shot("notebook7-latency-dark")
    book.use_theme("light")
    book.run(CLOSE)
    assert not console_errors

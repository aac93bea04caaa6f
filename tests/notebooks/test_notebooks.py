"""The notebooks, executed as a person would on a cluster started with `ipcluster start -n 3`, and what cells show.

Cells are named by their tags.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.ipclusters import IPython
from tests.support.notebook_pages import NOTEBOOKS, Page, executed, read

pytestmark = [pytest.mark.cluster, pytest.mark.notebook, pytest.mark.timeout(300)]

STEPPING = NOTEBOOKS / "01-stepping.ipynb"


@pytest.fixture(scope="module")
def stepping(engines: IPython) -> Page:
    """01-stepping, executed from its first cell to its last; a cell that fails ends it."""
    return executed(read(STEPPING), engines.folder)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.rglob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_keep_no_outputs(path: Path) -> None:
    for cell in read(path).cells:
        assert not cell.get("outputs"), cell.source
        assert cell.get("execution_count") is None, cell.source


def test_begins_with_a_session(stepping: Page) -> None:
    waited, _, joined = stepping.text("connect").partition("\n")
    assert "importing PyTorch" in waited
    assert joined.strip().startswith("joined profile 'default' (local engines): ranks 0–2 on ")
    assert "demo on 3 CPUs" in stepping.text("load")
    assert "run of 30 tokens in 4 chunks, pipelined, pairwise: paused" in stepping.text("prefill")
    assert stepping.text("prefill").count("stands before its first layer") == 3


@pytest.mark.parametrize(
    ("tag", "lines"),
    [
        ("op", ["rank 0: embed c0", "rank 1: nothing", "rank 2: nothing"]),
        ("layer", ["rank 0: computed c0 l0, sent block c0 l0 to 1", "rank 1: received block c0 l0 from 0"]),
        ("wave", ["rank 0: computed c0 l1", "rank 2: received block c0 l1 from 0"]),
        ("chunk", ["rank 1: computed c0 l2, c0 l3", "rank 2: computed c0 l4, c0 l5"]),
        ("where", ["paused", "rank 0: 12 of 49 ops done; stands at c0 l1", "rank 2: 11 of 47"]),
        ("back", ["undid c0 l4, c0 l5 on ranks 0–2"]),
        ("to", ["rank 0: computed c1 l0, c1 l1", "rank 2: computed c0 l4, c0 l5"]),
        ("break", ["#1: after layer 4, chunk 2", "paused", "stands at c2 l4", "stopped at #1: after layer 4"]),
        ("condition", ["#2: after each layer, on rank 1, when absmax > 5", "`: hidden reaches "]),
        ("restart", ["paused", "rank 0: 0 of 49 ops done"]),
        ("px", ["rank 0: one wave, 4 ops", "embed c0   hidden [1, 8, 128]", "recv kv c0 l0 <- 0, 8 tokens   K"]),
        ("alone", ["rank 1 waits for hidden c0 before layer 2 from rank 0, which stands at c0 l1"]),
        ("again", ["rank 1: one wave, 5 ops", "recv hidden c0 l2 <- 0", "layer c0 l2   K"]),
        ("end", ["rank 2: computed c0 l4"]),
        ("kv", ["layer 0 on rank 2: 30 tokens, chunks [0, 1, 2, 3]", "V [2, 30, 32] 0 … 0, mean 0"]),
        ("differ", ["the ranks' tokens differ, first at new token 1", "rank 2 chose"]),
        ("edited", ["done", "the ranks' tokens differ", "edited by hand: KV of layer 0 on rank 2"]),
        ("recover", ["weights stayed where they were"]),
        ("decode", [" 4\n(1 new token, 1 in all)", "7\n(1 new token, 2 in all)"]),
        ("token", ["4 in all, and the text ends here"]),
        ("token-back", ["4 in all, and the text ends here"]),
        ("moved", ["rank 0: computed c0 l0, c0 l1"]),
        ("magic", ["rank 0: embed c1, computed c1 l0, c1 l1"]),
        ("verbs", ["%dinfer VERB", "step ", "break "]),
        ("log", ["loaded demo", "stopped at #1", "stopped at #2", "tokens differ", "all ranks have met again"]),
    ],
)  # fmt: skip
def test_cells_show(stepping: Page, tag: str, lines: list[str]) -> None:
    text = stepping.text(tag)
    for line in lines:
        assert line in text


def test_every_cell_that_shows_something_is_looked_at(stepping: Page) -> None:
    """A tag is there to be checked: all of them are named in this file."""
    here = Path(__file__).read_text(encoding="utf-8")
    assert [tag for tag in stepping.outputs if f'"{tag}"' not in here] == []


def test_the_edit_shows_in_digests_and_is_gone_after_a_restart(stepping: Page) -> None:
    edited = re.findall(r"rank \d: ([0-9a-f]{12})", stepping.text("differ"))
    assert edited[0] == edited[1] != edited[2]
    assert stepping.text("equal") == f"{{'{edited[0]}'}}"


def test_the_panel_leaves_a_picture_and_no_output_is_a_widget(stepping: Page) -> None:
    """In place of a widget, Jupyter shows an error in a notebook that is opened again."""
    assert "<svg" in stepping.html("panel")
    outputs = [output for outputs in stepping.outputs.values() for output in outputs]
    assert not any("application/vnd.jupyter.widget-view+json" in one.get("data", {}) for one in outputs)


def test_what_is_returned_has_an_html_form(stepping: Page) -> None:
    assert "stands at c0 l1" in stepping.html("where")
    assert "<pre" in stepping.html("where")
    assert "<svg" in stepping.html("prefill")  # a run is its panel, whose still picture this is
    assert stepping.text("close") == ""

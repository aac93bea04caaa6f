"""06-desk, in English and in Chinese, executed on threads and on a cluster of `ipcluster start -n 3`; what its cells
show, named by tags."""

from __future__ import annotations

import pytest

from tests.support.ipclusters import IPython
from tests.support.notebook_pages import NOTEBOOKS, Page, executed, read

pytestmark = [pytest.mark.cluster, pytest.mark.notebook, pytest.mark.timeout(300)]

DESK = {"en": NOTEBOOKS / "06-desk.ipynb", "zh": NOTEBOOKS / "zh" / "06-desk.ipynb"}
CHOICE = 'where = "ipyparallel"'

SHOWN: dict[str, list[str]] = {
    "connect": ["demo on 3 CPUs"],
    "good": [" 471\n(4 new tokens"],
    "bad": ["run 1 keeps its KV", " 461\n(4 new tokens"],
    "desk": ["Panel object"],
    "runs": ["run 1  done", "nothing odd", "run 2  done", "1 fault armed", "on the ranks"],
    "compare": ["KV differs, first at block c1 l1; rank 0", "V: stale: rows 8–15 hold rows 0–7", "≠"],
    "bisect": [
        "the answer turns wrong at V of block c1 l1 on rank 0: it is '461'; with the other run's block it is '471'",
        "all but V of block c1 l1 on rank 0",
    ],
    "kv": ["changed afterwards in its memory", "after `layer c1 l1` in rank 0's memory"],
    "lanes": ["a figure of "],
    "mend": [" 471\n(4 new tokens"],
    "calls": ["run.inject(", "run.decode(8)", "run.faults.clear()", "run.restart()"],
    "cell": ["import dinfer\n", "run = session.prefill('The code of Lima is 471.", "run.restart()\nrun.decode(8)"],
    "save": ["after-the-mend"],
    "close": [],
}  # fmt: skip

SLOW = (("en", "cluster"), ("zh", "threads"), ("zh", "cluster"))


@pytest.fixture(
    scope="module",
    params=[("en", "threads"), *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)],
    ids="-".join,
)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """06-desk, executed on threads, with its one variable changed, or on a cluster; in a folder that it writes to."""
    language, where = request.param
    folder = tmp_path_factory.mktemp("desk")
    notebook = read(DESK[language])
    if where == "threads":
        [cell] = [cell for cell in notebook.cells if CHOICE in cell.source]
        cell.source = cell.source.replace(CHOICE, 'where = "threads"')
    else:
        engines: IPython = request.getfixturevalue("engines")
        assert engines
    return executed(notebook, folder)


@pytest.mark.parametrize("tag", SHOWN)
def test_cells_of_desk_show(desk: Page, tag: str) -> None:
    text = desk.text(tag)
    for line in SHOWN[tag]:
        assert line in text


def test_every_cell_of_desk_is_looked_at(desk: Page) -> None:
    assert set(desk.outputs) == set(SHOWN)

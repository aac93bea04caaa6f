"""04-deadlock, executed on a cluster of `ipcluster start -n 3` and on threads; what its cells show, named by tags."""

from __future__ import annotations

import pytest

from tests.support.ipclusters import IPython
from tests.support.notebook_pages import NOTEBOOKS, Page, executed, read

pytestmark = [pytest.mark.cluster, pytest.mark.notebook, pytest.mark.timeout(300)]

DEADLOCK = NOTEBOOKS / "04-deadlock.ipynb"
CHOICE = 'where = "ipyparallel"'
CIRCLE = (
    "rank 0 sends block c0 l0 to rank 1 and waits; rank 1 sends block c0 l2 to rank 2 and waits; rank 2 sends block "
    "c0 l4 to rank 0 and waits"
)
HANGS = (
    "deadlock: rank 0 waits for rank 1 to take block c0 l0; rank 1 waits for rank 2 to take "
    "block c0 l2; rank 2 waits for rank 0 to take block c0 l4"
)


SHOWN: dict[str, list[str]] = {
    "connect": ["demo on 3 CPUs"],
    "plan": ["schedule batched", "  send kv c0 l0 -> 1, 30 tokens\n", "rank 2 lane main"],
    "proof": [f"refuted: deadlock with rendezvous sends: {CIRCLE}"],
    "refused": [f"PlanRefused: refuted: deadlock with rendezvous sends: {CIRCLE}", "\n┌▶ "],
    "hangs": [HANGS],
    "verdict": [HANGS, "rank 0: waits for rank 1 to take block c0 l0", "verdict.stacks"],
    "compare": [
        f"rank {rank}: guessed …; proved `{op}`; stands in `{op}`\n"
        for rank, op in enumerate(
            (
                "send kv c0 l0 -> 1, 30 tokens",
                "send kv c0 l2 -> 2, 30 tokens",
                "send kv c0 l4 -> 0, 30 tokens",
            )
        )
    ],
    "half": ["refuted: ", "rank 0 sends block c0 l0 to rank 2", "rank 1 sends block c0 l2 to rank 0 and waits"],
    "mended": ["proved: 3 ranks, 3 lanes, 40 ops", "no deadlock with rendezvous or buffered sends"],
    "recover": ["all ranks have met again; weights stayed where they were"],
    "runs": ["done\nrank 0: all 13 ops done"],
    "answer": [" 471\n(4 new tokens"],
    "rule": ["done\nrank 0: all 49 ops done", " 471\n(4 new tokens"],
    "schedules": ["lockstep, ring, chunks of 4: cannot hang", "batched, pairwise, chunks of 32: can hang"],
    "equal": ["rank by rank the same KV: True"],
    "close": [],
}  # fmt: skip


def on_threads() -> Page:
    """The notebook with its one variable changed."""
    notebook = read(DEADLOCK)
    [cell] = [cell for cell in notebook.cells if CHOICE in cell.source]
    cell.source = cell.source.replace(CHOICE, 'where = "threads"')
    return executed(notebook)


@pytest.fixture(scope="module", params=["cluster", pytest.param("threads", marks=pytest.mark.slow)])
def deadlock(request: pytest.FixtureRequest, engines: IPython) -> Page:
    """04-deadlock, executed on a cluster or, with its one variable changed, on threads."""
    if request.param == "threads":
        return on_threads()
    return executed(read(DEADLOCK), engines.folder)


@pytest.mark.parametrize("tag", SHOWN)
def test_cells_of_deadlock_show(deadlock: Page, tag: str) -> None:
    text = deadlock.text(tag)
    for line in SHOWN[tag]:
        assert line in text


def test_every_cell_of_deadlock_is_looked_at(deadlock: Page) -> None:
    assert set(deadlock.outputs) - {"raises-exception"} == set(SHOWN)


def test_only_the_rule_that_hangs_can_hang(deadlock: Page) -> None:
    lines = deadlock.text("schedules").split("\n")
    told = [line for line in lines if line]
    assert len(told) == 18
    assert all(line.endswith(": can hang") == line.startswith("batched") for line in told)


def test_circle_and_hang_are_drawn_once(deadlock: Page) -> None:
    drawings = [output.data for output in deadlock.outputs["refused"] if output.output_type == "display_data"]
    assert ["image/svg+xml" in data for data in drawings] == [True]
    assert deadlock.html("verdict").count("<svg") == 1


def test_the_reader_s_guess_is_left_to_the_reader() -> None:
    [cell] = [cell for cell in read(DEADLOCK).cells if cell.source.startswith("guess = ")]
    assert cell.source.count('"…"') == 3

"""The notebooks, executed as a person would on a cluster started with `ipcluster start -n 3`, and what cells show.

Cells are named by their tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.ipclusters import stock_cluster
from tests.notebooks.pages import NOTEBOOKS, Page, executed, read

pytestmark = [pytest.mark.cluster, pytest.mark.notebook, pytest.mark.timeout(300)]

STEPPING = NOTEBOOKS / "01-stepping.ipynb"
DEADLOCK = NOTEBOOKS / "04-deadlock.ipynb"
CHOICE = 'where = "ipyparallel"'
CIRCLE = (
    "rank 0 sends block c0 l0 to rank 1 and waits; rank 1 sends block c0 l2 to rank 2 and waits; rank 2 sends block "
    "c0 l4 to rank 0 and waits"
)
HANGS = (
    "these wait for one another for ever: rank 0 waits for rank 1 to take block c0 l0; rank 1 waits for rank 2 to take "
    "block c0 l2; rank 2 waits for rank 0 to take block c0 l4"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all notebooks, which come to it one after another."""
    with stock_cluster(tmp_path_factory.mktemp("notebooks")):
        yield


@pytest.fixture(scope="module")
def stepping(cluster: None) -> Page:  # noqa: ARG001 - it is there
    return executed(read(STEPPING))


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.rglob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_keep_no_outputs(path: Path) -> None:
    for cell in read(path).cells:
        assert not cell.get("outputs"), cell.source
        assert cell.get("execution_count") is None, cell.source


def test_begins_with_a_session(stepping: Page) -> None:
    assert stepping.text("connect").startswith("joined profile 'default' (local engines): ranks 0–2 on ")
    assert "demo on cpu, cpu, cpu" in stepping.text("load")
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
        ("back", ["rank 0: undid ", "rank 2: undid computed c0 l4, c0 l5"]),
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
        ("edited", ["done", "edited by hand: KV of layer 0 on rank 2"]),
        ("recover", ["weights stayed where they were"]),
        ("decode", [" 4\n(1 new tokens, 1 in all)", "7\n(1 new tokens, 2 in all)"]),
        ("token", ["4 in all, and the text ends here"]),
        ("token-back", ["4 in all, and the text ends here"]),
        ("moved", ["rank 0: computed c0 l0, c0 l1"]),
        ("magic", ["rank 0: computed c1 l0, c1 l1"]),
        ("verbs", ["%dinfer VERB", "step ", "break "]),
        ("log", ["loaded demo", "stopped at #1", "stopped at #2", "all ranks have met again"]),
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


def test_the_panel_is_live_and_leaves_a_picture(stepping: Page) -> None:
    [output] = [one for one in stepping.outputs["panel"] if "text/html" in one.get("data", {})]
    assert "application/vnd.jupyter.widget-view+json" in output.data
    assert "<svg" in stepping.html("panel")


def test_what_is_returned_has_an_html_form(stepping: Page) -> None:
    assert "stands at c0 l1" in stepping.html("where")
    assert "<pre" in stepping.html("prefill")
    assert stepping.text("close") == ""


# -- 04-deadlock

DEADLOCK_SHOWS: dict[str, list[str]] = {
    "connect": ["demo on cpu, cpu, cpu"],
    "plan": ["schedule batched", "  send kv c0 l0 -> 1, 30 tokens\n", "rank 2 lane main"],
    "proof": [f"refuted: with rendezvous sends these wait for one another for ever: {CIRCLE}"],
    "refused": [f"PlanRefused: refuted: with rendezvous sends these wait for one another for ever: {CIRCLE}", "\n┌▶ "],
    "hangs": [HANGS],
    "verdict": [HANGS, "rank 0's Python:", "met = comm.send("],
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
def deadlock(request: pytest.FixtureRequest) -> Page:
    """04-deadlock, executed on a cluster or, with its one variable changed, on threads."""
    if request.param == "threads":
        return on_threads()
    request.getfixturevalue("cluster")
    return executed(read(DEADLOCK))


@pytest.mark.parametrize("tag", DEADLOCK_SHOWS)
def test_cells_of_deadlock_show(deadlock: Page, tag: str) -> None:
    text = deadlock.text(tag)
    for line in DEADLOCK_SHOWS[tag]:
        assert line in text


def test_every_cell_of_deadlock_is_looked_at(deadlock: Page) -> None:
    assert set(deadlock.outputs) - {"raises-exception"} == set(DEADLOCK_SHOWS)


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

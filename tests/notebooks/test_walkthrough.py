"""00-walkthrough, in English and in Chinese, and 03-latency: executed from start to end, and what their cells show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from dinfer.trace.read import read_jsonl, read_traces
from tests.support.ipclusters import IPython
from tests.support.notebook_pages import NOTEBOOKS, Page, executed, read

pytestmark = [pytest.mark.cluster, pytest.mark.notebook, pytest.mark.timeout(300)]

WALKTHROUGH = NOTEBOOKS / "00-walkthrough.ipynb"
CHINESE = NOTEBOOKS / "zh" / "00-walkthrough.ipynb"
LATENCY = NOTEBOOKS / "03-latency.ipynb"
PLOT = "application/vnd.plotly.v1+json"
CIRCLE = "rank 0 waits for rank 1 to take block c0 l0; rank 1 waits for rank 2 to take block c0 l2; rank 2 waits for"
SHOWN: dict[str, list[str]] = {
    "connect": ["joined profile 'default' (local engines): ranks 0–2 on ", "demo on 3 CPUs"],
    "prefill": ["rank 0: embed c0, computed c0 l0, sent block c0 l0 to 1", "rank 2: received block c0 l0 from 0"],
    "chunk": ["rank 2: computed c0 l4, c0 l5"],
    "where": ["paused", "stands at c0 l1", "stands at c0 l5"],
    "to": ["rank 1: computed c1 l2, c1 l3"],
    "decode": ["new tokens, "],
    "same": ["all 3 ranks hold the same 6 × ", "bit for bit"],
    "reference": ["equal: all 3 ranks hold what transformers' own forward makes, bit for bit"],
    "inject": ["hit: #1 bitflip in K of block c1 l1 on rank 2, head 0, token 8, in memory: 1 of "],
    "differ": ["rank 2 differs at layer 1, K, head 0, token 8 ", "changed afterwards in its memory"],
    "again": ["all 3 ranks hold the same 6 × ", "bit for bit"],
    "sweep": ["sync_strategy", "exposed_wire", "= 100 %", "pairwise ", "ring "],
    "slow": ["armed: #1 slow link 0→2, 20 ms more for each message"],
    "links": ["0→1: ", "0→2: ", " bytes, a transfer "],
    "refused": ["refuted: deadlock with rendezvous sends", "┌▶ rank 0 sends block c0 l0"],
    "hang": [f"deadlock: {CIRCLE}"],
    "verdict": ["cycle (0, 1, 2)", "rank 0: waits for rank 1 to take block c0 l0 (K and V, 8 tokens, 4,096 bytes, "],
    "recover": ["all ranks have met again; weights stayed where they were"],
    "report": ["rank 2", "c1 l1", "report.html"],
}  # fmt: skip
OF_LATENCY: dict[str, list[str]] = {
    "connect": ["demo on 3 CPUs"],
    "run": [" events, 212 transfers"],
    "percentiles": ["0→1: 45 transfers, wire p50 ", "2→1: 31 transfers"],
    "told": ["exposed communication: ", "most of it on link "],
    "slow": ["armed: #1 slow link 0→2, 20 ms more for each message"],
    "slow-layer": ["armed: #2 slow rank 1, 20 ms more for each layer"],
    "slow-link": ["0→2: 30 transfers", "most of it on link "],
    "slow-rank": ["1→2: 45 transfers"],
    "live": ["events after each tenth of a second: "],
    "sweep": ["pairwise ", "ring "],
    "export": ["trace.perfetto.json", "trace.jsonl", "latency.html"],
}  # fmt: skip
PLOTS = {
    *("exposure", "latency", "gantt", "distribution", "matrix", "slow-latency", "layers", "slow-rank"),
    *("live-latency", "ring", "swept"),
}
SILENT = {"panel", "fast", "healed", "close"}
"""cells that show no words"""


# tests/cluster/test_demo.py has the Chinese one run in any case.
@pytest.fixture(
    scope="module", params=[WALKTHROUGH, pytest.param(CHINESE, marks=pytest.mark.slow)], ids=["en", "zh"]
)
def walk(request: pytest.FixtureRequest, engines: IPython) -> Page:
    """The walkthrough."""
    return executed(read(request.param), engines.folder)


@pytest.fixture(scope="module")
def latency(engines: IPython) -> Page:
    """03-latency."""
    return executed(read(LATENCY), engines.folder)


def check_shown(page: Page, shown: dict[str, list[str]]) -> None:
    """Every cell that has a tag shows what is said of it, and no more cells have one."""
    assert set(page.outputs) == shown.keys() | PLOTS.intersection(page.outputs) | SILENT.intersection(
        page.outputs
    )
    for tag, lines in shown.items():
        for line in lines:
            assert line in page.text(tag), tag


def check_plots(page: Page) -> None:
    """Each is data for the front end, and no script."""
    for tag in PLOTS & set(page.outputs):
        [output] = [one for one in page.outputs[tag] if PLOT in one.get("data", {})]
        assert output.data[PLOT]["data"], tag
        assert output.data[PLOT]["config"]["showSendToCloud"] is False
        assert "text/html" not in output.data


def test_the_walkthrough_shows_what_it_tells(walk: Page, engines: IPython) -> None:
    check_shown(walk, SHOWN)
    check_plots(walk)
    assert "471" in walk.text("decode") or "759" in walk.text("decode")
    assert "<svg" in walk.html("panel")
    [trace] = read_traces(engines.folder / "report.html")
    assert {event.rank for event in trace.events} == {0, 1, 2}


def test_breakpoints_set_in_the_panel_do_not_stand_in_the_way(engines: IPython) -> None:
    notebook = read(WALKTHROUGH)
    numbers = {tag: n for n, cell in enumerate(notebook.cells) for tag in cell.metadata.get("tags", ())}
    kept = [cell for cell in notebook.cells[: numbers["again"] + 1] if cell.cell_type == "code"]
    for tag in ("panel", "differ"):  # where a reader may have double-clicked
        cell = notebook.cells[numbers[tag]]
        cell.source += "\nrun.break_at(layer=3, chunk=2)\nrun.break_at(layer=5, chunk=2)"
    notebook.cells = [*kept, nbformat.v4.new_code_cell("session.close()")]  # type: ignore[no-untyped-call]
    page = executed(notebook, engines.folder)
    assert "new tokens, " in page.text("decode")
    assert "bit for bit" in page.text("again")
    assert "not on all of them" not in page.text("again")


def test_the_slowed_link_is_told(walk: Page) -> None:
    """It sleeps 20 ms a transfer; how long others take is up to the machine."""
    found = dict(re.findall(r"(\d→\d): .* a transfer ([0-9.]+) ms", walk.text("links")))
    assert len(found) == 6
    assert float(found["0→2"]) >= 20


@pytest.mark.parametrize("chinese_path", sorted(CHINESE.parent.glob("*.ipynb")), ids=lambda path: path.stem)
def test_both_languages_are_the_same_but_for_words(chinese_path: Path) -> None:
    english, chinese = (read(path).cells for path in (NOTEBOOKS / chinese_path.name, chinese_path))
    assert [cell.cell_type for cell in english] == [cell.cell_type for cell in chinese]
    assert [without_prompt(cell) for cell in english] == [without_prompt(cell) for cell in chinese]
    texts = [cell.source for cell in chinese if cell.cell_type == "markdown"]
    assert all(re.search(r"[\u4e00-\u9fff]", text) for text in texts)


def without_prompt(cell: Any) -> tuple[str, ...]:
    """A code cell's tags and lines, but for the prompt."""
    if cell.cell_type == "markdown":
        return ()
    lines = [line for line in cell.source.splitlines() if not line.startswith("prompt = ")]
    return (*cell.metadata.get("tags", ()), *lines)


@pytest.mark.parametrize(
    "path", sorted(NOTEBOOKS.rglob("*.ipynb")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_links_lead_to_headings_and_to_notebooks_that_are_named_so(path: Path) -> None:
    texts = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    headings = {
        line.lstrip("# ").replace(" ", "-") for text in texts for line in text.splitlines() if line[:1] == "#"
    }
    for link in re.findall(r"\]\(([^)]+)\)", "\n".join(texts)):
        if link.startswith("#"):
            assert link[1:] in headings
        elif not link.startswith("https:"):
            assert re.fullmatch(r"(\.\./)?0[0-4]-[a-z]+\.ipynb", link)


def test_latency_shows_what_it_tells(latency: Page) -> None:
    check_shown(latency, OF_LATENCY)
    check_plots(latency)


def test_the_slow_link_is_slow_on_the_wire(latency: Page) -> None:
    wire = dict(re.findall(r"(\d→\d): \d+ transfers, wire p50 ([0-9.]+) ms", latency.text("slow-link")))
    assert len(wire) == 6
    assert float(wire["0→2"]) >= 20


def test_a_run_was_drawn_while_it_ran(latency: Page) -> None:
    seen = [int(number) for number in latency.text("live").partition(": ")[2].split()]
    assert seen == sorted(seen)
    assert len(set(seen)) > 1


def test_what_is_exported_can_be_read(latency: Page, engines: IPython) -> None:
    assert latency.outputs["export"]
    trace = read_jsonl(engines.folder / "trace.jsonl")
    assert trace.about["sync_strategy"] == "ring"
    assert json.loads((engines.folder / "trace.perfetto.json").read_text())["traceEvents"]
    assert read_traces(engines.folder / "latency.html")

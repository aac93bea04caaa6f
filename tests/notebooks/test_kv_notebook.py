"""02-kv, executed on a cluster started with `ipcluster start -n 3`, and what its cells show; named by their tags."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.ipclusters import IPython
from tests.support.notebook_pages import NOTEBOOKS, Page, executed, read

pytestmark = [pytest.mark.cluster, pytest.mark.notebook, pytest.mark.timeout(300)]

KV = NOTEBOOKS / "02-kv.ipynb"


@pytest.fixture(scope="module")
def kv(engines: IPython) -> Page:
    """The notebook; what it puts aside goes to a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(engines.folder))
        return executed(read(KV), engines.folder)


def test_every_cell_that_shows_something_is_looked_at() -> None:
    """A tag is there to be checked: all of them are named in this file."""
    here = Path(__file__).read_text(encoding="utf-8")
    assert [tag for tag in Page(read(KV)).outputs if f'"{tag}"' not in here] == []


@pytest.mark.parametrize(
    ("tag", "lines"),
    [
        ("begin", ["joined profile 'default' (local engines): ranks 0–2 on ", "demo on 3 CPUs"]),
        ("right", [" 471\n(4 new tokens"]),
        ("held", ["layer 5 (of rank 2), tokens: rank 0 holds 33, rank 1 holds 33, rank 2 holds 33"]),
        ("equal", ["all 3 ranks hold the same 6 × 4 blocks, and rows of 3 new tokens, bit for bit", " bytes moved"]),
        ("layer", ["layer 1 (of rank 0)", "head ", " min ", "K, head 0, token 3 'Lima': "]),
        ("values", ["Lima tensor(["]),
        ("inject", ["armed: #1 stale in V of block c1 l1 on rank 0, in memory"]),
        ("reference", ["placement is wrong: on all 3 ranks, layer 1, chunk 1: V: stale: rows 8–15 hold rows 0–7",
            "computed there in chunk 1, changed afterwards in its memory"]),
        ("block", ["rank 0, layer 1, chunk 1: V: stale: rows 8–15 hold rows 0–7 of the chunk before",
            "changed afterwards in its memory"]),
        ("same", ["True"]),
        ("bisect", [
            "turns wrong at V of block c1 l1 on rank 0: it is '461'; with the reference's block it is '471'"]),
        ("told", ["changed bytes: ", "received a changed V of block c1 l1 from rank 0", "hit: #1 stale"]),
        ("mended", [" 471\n(4 new tokens"]),
        ("received", ["rank 0 received 100%", "rank 1 received 100%", "rank 2 received 100%"]),
        ("repeated", [
            "placement is wrong: all 3 ranks hold 34 rows of every layer, the reference 32; row 31 repeats row 30"]),
        ("too-many", ["all 3 ranks hold 34 tokens of layers 0–5, it should be 32; row 31 repeats row 30"]),
        ("ring", ["this run and saved run 'good' hold the same 6 × 4 blocks, and rows of 3 new tokens, bit for bit"]),
        ("changed", [" 471\n(4 new tokens"]),
        ("folders", ["rank 0 of saved run 'changed' differs at layer 3, K, head 0, token 16",
            "it changed at hop 1→2", "recv kv c2 l3 <- 1", "more: .table(None) shows all"]),
        ("opened", ["saved run 'changed': 30 tokens in 4 chunks, pipelined, ring: done, 4 new tokens",
            "hit: #1 cast in K", "the run is done"]),
        ("files", ["FORMAT.md", "kv.layer5.safetensors", "run.json"]),
    ],
)  # fmt: skip
def test_kv_cells_show(kv: Page, tag: str, lines: list[str]) -> None:
    text = kv.text(tag)
    for line in lines:
        assert line in text


def test_an_equal_diff_moves_little(kv: Page) -> None:
    [moved] = re.findall(r"([\d,]+) bytes moved", kv.text("equal"))
    assert int(moved.replace(",", "")) < 33 * 6 * 512 / 5


def test_the_stale_block_makes_the_answer_wrong_on_all_ranks_alike(kv: Page) -> None:
    assert re.match(r" \d", kv.text("wrong"))
    assert not kv.text("wrong").startswith(" 471")
    assert kv.text("agree").count("'") == 2


def test_the_real_faults_are_named_in_the_first_line(kv: Page) -> None:
    twice = "✖ error: rank 1 holds 52 tokens of layer 0, the others 26; rows 26–51 repeat rows 0–25"
    assert kv.text("twice").strip().splitlines()[0] == twice
    assert kv.text("text").count("'") == 2
    assert not kv.text("text").startswith(" 471")

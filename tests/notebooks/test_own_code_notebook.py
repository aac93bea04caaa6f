"""05-your-own-code, in English and in Chinese, executed: torchrun's processes and a cluster under watch; what its cells
show, named by tags."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.ipclusters import IPython
from tests.support.notebook_pages import NOTEBOOKS, Page, executed, read

pytestmark = [pytest.mark.cluster, pytest.mark.notebook, pytest.mark.slow, pytest.mark.timeout(600)]

OWN_CODE = {
    "en": NOTEBOOKS / "05-your-own-code.ipynb",
    "zh": NOTEBOOKS / "zh" / "05-your-own-code.ipynb",
}
MISMATCH = "`broadcast c2 l0` ([8, 32] float32) at prefill.py:27 in sync on rank 0 meets `barrier"


SHOWN: dict[str, list[str]] = {
    "load": [],
    "program": ["Writing prefill.py"],
    "start": [],
    "hangs": ["WatchHung: ", MISMATCH, "the command runs on: .close() ends it"],
    "verdict": [MISMATCH, "rank 0's Python:", "prefill.py:21 in stage: sync(layer, hidden)"],
    "panel": ["prefill.py runs", MISMATCH],
    "mended": ["exit status 0", "rank 0 is done", "rank 1 is done", "rank 2 is done"],
    "links": ["0→1                    3", "broadcast (default)   54"],
    "handover": ["Writing handover.py"],
    "ends": ["0"],
    "kv": ["3         0              30              38", "rows 16–23 repeat rows 8–15"],
    "diff": ["'kind': 'rows repeated'", "'ranks': (1,)", "'layer': 3", "'chunk': 1"],
    "compare": [
        "placement is wrong: layer 3, K, chunk 2, token 16, on rank 1: it holds what belongs to row 8",
        "compared: hidden, K, V, output of 6 layers",
    ],
    "report": ["own-code.html"],
    "verify": ["proved: 2 ranks, 52 ops: this order comes to its end, also if every send waits"],
    "connect": ["ranks 0–2", "rank 2: "],
    "px": [],
    "px-verdict": ["deadlock: rank 0 is in `recv <- 2` ([4] float32)", "rank 2 is in `all_reduce` ([4] float32)"],
    "px-panel": ["rank 1: in `all_reduce`"],
    "recover": ["rank 1 was stuck and is started again", "all ranks have met"],
    "px-again": ["tensor([3., 3., 3., 3.])"],
    "close": [],
}  # fmt: skip


@pytest.fixture(scope="module", params=OWN_CODE)
def own_code(
    request: pytest.FixtureRequest, engines: IPython, tmp_path_factory: pytest.TempPathFactory
) -> Page:
    """Each in a folder of its own, in which it writes files, by a kernel whose environment is not the shell's."""
    assert engines
    own = Path(sys.executable).parent
    path = [part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != own]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.pathsep.join(path))
        return executed(read(OWN_CODE[request.param]), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("tag", SHOWN)
def test_cells_of_own_code_show(own_code: Page, tag: str) -> None:
    text = own_code.text(tag)
    for line in SHOWN[tag]:
        assert line in text


def test_every_cell_of_own_code_is_looked_at(own_code: Page) -> None:
    assert set(own_code.outputs) - {"raises-exception"} == set(SHOWN)


def test_nothing_is_said_of_engines_that_end(own_code: Page) -> None:
    assert own_code.text("close") == ""


def test_the_panels_leave_pictures(own_code: Page) -> None:
    assert own_code.html("panel").count("<svg") == 2  # blocks, and what went between ranks
    assert "27: dist.broadcast(kv.clone(), src=owner(layer))" in own_code.html("panel")
    assert own_code.html("px-panel").count("<svg") == 1

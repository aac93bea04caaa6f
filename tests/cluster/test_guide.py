"""What README and guide tell people to run, run: every shell block, every page's cells, and the program, as written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.support.guide import GUIDE, PAGES, ROOT, blocks, cells
from tests.support.ipclusters import ipython
from tests.support.notebook_pages import executed

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

LEFT_OUT = ("bash env/test", "bash env/demo", "env/launch", "ipcluster start")
"""this very test run; what needs several machines, does not end by itself or has tests of its own"""


def commands() -> list[str]:
    """Every shell block that is to be run, once; a block's commands may build on one another."""
    found: dict[str, None] = {}
    for page in PAGES:
        for block in blocks(page, "sh"):
            kept = [line for line in block.splitlines() if not line.startswith(LEFT_OUT)]
            if kept:
                found["\n".join(kept)] = None
    return list(found)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder like a fresh checkout's, for commands that write files, with a script of the user's own in it."""
    shutil.copytree(ROOT / "env", tmp_path / "env")
    shutil.copy(ROOT / "tests" / "support" / "programs" / "healthy.py", tmp_path / "infer.py")
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ran = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, timeout=380, check=False
    )
    out = ran.stdout.decode("utf-8")
    assert ran.returncode == 0, out + ran.stderr.decode("utf-8")
    assert "\ufffd" not in out
    return out


@pytest.mark.parametrize("block", commands(), ids=lambda block: block.split("\n")[0][:40])
def test_a_command_runs_as_written(block: str, desk: Path) -> None:
    run(["bash", "-euo", "pipefail", "-c", block], desk)


def test_the_program_runs_as_written(tmp_path: Path) -> None:
    program = next(block for block in blocks(GUIDE / "program.md", "python") if "open_engine" in block)
    (tmp_path / "app.py").write_text(program, encoding="utf-8")
    told = run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "app.py"],
        tmp_path,
    )
    assert [line.strip() for line in told.splitlines()][-2:] == ["471", "759"]


@pytest.mark.parametrize(
    ("readme", "answer"),
    [("README.md", "471"), pytest.param("notebooks/zh/README.md", "759", marks=pytest.mark.slow)],
)
def test_the_notebook_cell_runs_as_written(
    readme: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cluster runs, so it starts its own, and ends it."""
    cell = next(block for block in blocks(ROOT / readme, "python") if "%load_ext" in block)
    (tmp_path / "cell.ipy").write_text(f"{cell}\nprint(run.text)\n", encoding="utf-8")
    with ipython(tmp_path / "ipython"):
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        told = run([sys.executable, "-m", "IPython", "--no-banner", "cell.ipy"], tmp_path)
    assert told.strip().endswith(answer)


@pytest.mark.parametrize(
    ("page", "answers"),
    [
        pytest.param("start", ["471", "all 3 ranks hold the same", "report.html"], marks=pytest.mark.slow),
        pytest.param("hang", ["cycle"], marks=pytest.mark.slow),  # two notebooks do the same
        ("kv", ["rank 2 differs at layer 4, K, head 1", "bitflip"]),
        pytest.param("stepping", ["next `layer c1 l2`"], marks=pytest.mark.slow),
        ("save", ["471"]),
    ],
)
def test_the_cells_of_a_page_run_as_written(
    page: str, answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a notebook, which such a page is."""
    notebook = new_notebook(  # type: ignore[no-untyped-call]
        cells=[
            new_code_cell(cell, metadata={"tags": [str(n)]})  # type: ignore[no-untyped-call]
            for n, cell in enumerate(cells(GUIDE / f"{page}.md"))
        ]
    )
    with ipython(tmp_path / "ipython"):
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        shown = executed(notebook, tmp_path)
    text = "\n".join(map(shown.text, shown.outputs))
    assert [answer for answer in answers if answer not in text] == []

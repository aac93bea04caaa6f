"""What README and guide tell people to run, run: every shell block, every page's cells, and the program, as written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.guide import GUIDE, PAGES, ROOT, blocks, cells
from tests.support.ipclusters import ipython

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
    """A folder like a fresh checkout's, for commands that write files."""
    shutil.copytree(ROOT / "env", tmp_path / "env")
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


def run_cells(
    given: list[str], last: str, folder: Path, monkeypatch: pytest.MonkeyPatch, page: str = "cells"
) -> str:
    """Run cells one after another in IPython, as a notebook would; each that ends in a value shows it."""
    (folder / f"{page}.ipy").write_text("\n".join([*given, last]) + "\n", encoding="utf-8")
    with ipython(folder / "ipython"):
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        return run([sys.executable, "-m", "IPython", "--no-banner", f"{page}.ipy"], folder)


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
    shown = run_cells([cell], "print(run.text)", tmp_path, monkeypatch)
    assert shown.strip().endswith(answer)


@pytest.mark.parametrize(
    ("page", "last", "answer"),
    [
        pytest.param("start", "print(run.text)", "471", marks=pytest.mark.slow),
        ("hang", "print(hanging)", "cycle"),
        ("kv", "print(broken.verdict)", "rank 2 differs at layer 4, K, head 1"),
        pytest.param("stepping", "print(run.where())", "stands at c1 l0", marks=pytest.mark.slow),
        ("save", "print(decoded)", " 471"),
    ],
)
def test_the_cells_of_a_page_run_as_written(
    page: str, last: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a page but `session.close()`, so that its state can be asked for at the end."""
    found = [cell.replace("session.close()\n", "") for cell in cells(GUIDE / f"{page}.md")]
    names = {"hang": ("print(run.verdict().kind)", "hanging = run.verdict().kind")}
    given = [cell.replace(*names[page]) if page in names else cell for cell in found]
    if page == "kv":
        given = [cell.replace("\nrun.kv().diff()", "\nbroken = run.kv().diff()") for cell in given]
    if page == "save":
        given = [cell.replace("replay.decode()", "decoded = replay.decode()") for cell in given]
    assert answer in run_cells(given, f"{last}\nsession.close()", tmp_path, monkeypatch, page)

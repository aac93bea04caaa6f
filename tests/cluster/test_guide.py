"""What README and guide tell people to run, run: every shell block, every page's cells, and the program, as written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.support.guide import GUIDE, PAGES, ROOT, blocks, cells
from tests.support.ipclusters import IPython, ipython
from tests.support.kernels import Kernel, kernel

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

LEFT_OUT = ("bash env/test", "bash env/demo", "env/launch", "ipcluster start", "dinfer vscode --install")
"""this very test run; what needs several machines or an editor, does not end by itself or has tests of its own"""


def commands() -> list[ParameterSet]:
    """Every shell block that is to be run, once; a block's commands may build on one another. Those that start ranks
    are slow, but for the README's."""
    found: dict[str, ParameterSet] = {}
    for page in PAGES:
        for block in blocks(page, "sh"):
            kept = "\n".join(line for line in block.splitlines() if not line.startswith(LEFT_OUT))
            is_slow = page != PAGES[0] and re.search(r"dinfer (run|doctor|bench)", kept)
            if kept and kept not in found:
                found[kept] = pytest.param(kept, marks=[pytest.mark.slow] if is_slow else [])
    return list(found.values())


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
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "app.py"],
        tmp_path,
    )
    assert [line.strip() for line in told.splitlines()][-2:] == ["471", "759"]


@pytest.mark.parametrize(
    ("readme", "answer"),
    [("README.md", "471"), pytest.param("notebooks/zh/README.md", "759", marks=pytest.mark.slow)],
)
def test_the_notebook_cell_runs_as_written(
    readme: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: IPython
) -> None:
    """Beside the cluster of `ipcluster start -n 3`, which it joins."""
    cell = next(block for block in blocks(ROOT / readme, "python") if "%load_ext" in block)
    (tmp_path / "cell.ipy").write_text(f"{cell}\nprint(run.text)\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    told = run([sys.executable, "-m", "IPython", "--no-banner", "cell.ipy"], tmp_path)
    assert "joined profile 'default'" in told
    assert told.strip().endswith(answer)
    assert len(engines.members("ipyparallel.engine")) >= 3


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """One kernel for the pages, where no cluster runs."""
    with ipython(tmp_path_factory.mktemp("pages")), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with kernel() as found:
            yield found


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
    page: str, answers: list[str], notebook: Kernel, tmp_path: Path
) -> None:
    """In a notebook, which such a page is."""
    notebook.run(f"%reset -f\n%cd {tmp_path}")
    shown = "\n".join(notebook.run(cell) for cell in cells(GUIDE / f"{page}.md"))
    assert [answer for answer in answers if answer not in shown] == []

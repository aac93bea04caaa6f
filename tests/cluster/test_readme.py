"""What the READMEs tell people to run, run: every shell command, and the program, as they are written there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ipclusters import ipython

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "notebooks/zh/README.md")
LEFT_OUT = ("bash env/test", "bash env/demo", "bash env/launch", "env/launch", "ipcluster start")
"""this very test run; what needs several machines, does not end by itself or has tests of its own"""


def blocks(readme: str, language: str) -> list[str]:
    """The code blocks of a README in one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (ROOT / readme).read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


def commands() -> list[str]:
    """Every shell block that is to be run; a block's commands may build on one another."""
    found = []
    for readme in READMES:
        for block in blocks(readme, "sh"):
            kept = [line for line in block.splitlines() if not line.startswith(LEFT_OUT)]
            if kept and not any("mpirun" in line for line in kept):
                found.append("\n".join(kept))
    return found


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


@pytest.mark.parametrize("block", commands(), ids=lambda block: block.split("\n")[0][:40])
def test_a_command_runs_as_written(block: str, desk: Path) -> None:
    run(["bash", "-euo", "pipefail", "-c", block], desk)


def test_the_program_runs_as_written(tmp_path: Path) -> None:
    program = next(block for block in blocks("README.md", "python") if "open_engine" in block)
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
    cell = next(block for block in blocks(readme, "python") if "%load_ext" in block)
    (tmp_path / "cell.ipy").write_text(f"{cell}\nprint(run.text)\n", encoding="utf-8")
    with ipython(tmp_path / "ipython"):
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        told = run([sys.executable, "-m", "IPython", "--no-banner", "cell.ipy"], tmp_path)
    assert told.strip().endswith(answer)

"""Every defect of `programs/defects.py` under every launcher: what is said, whom it blames, the line, the seconds.

The table is at the end of a run with `-rP`, and in the file that DINFER_DEFECTS_TABLE names.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinfer.lab.hosts import hosts
from dinfer.watch.probe.start import HOOK_VARIABLE
from tests.support.defect_list import (
    DEFECTS,
    TABLE,
    TOLD_S,
    Told,
    assert_in_time,
    assert_right,
    named_line,
    named_lines,
    told_of,
)
from tests.support.hosted import needs_hosts
from tests.support.ipclusters import IPython, within
from tests.support.kernels import Cell, Kernel, kernel
from tests.support.watched import PROGRAMS, mpirun, on_hosts, torchrun, watch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI's mpirun")

PATIENCE_S = 60.0

CELL = (PROGRAMS / "defects.py").read_text(encoding="utf-8").partition("\nif __name__")[0]
"""as it would be pasted into a cell; its lines keep their numbers"""


def keep(launcher: str, name: str, told: Told, seconds: float | None, file: str = "defects.py") -> None:
    """A row of the table."""
    took = f"{seconds:.1f} s" if seconds is not None else "at the end"
    row = (
        f"| {name} | {launcher} | {told.kind}, ranks {told.ranks} | {named_line(told, name, file)} | {took} |"
    )
    print(row)
    if TABLE:
        with Path(TABLE).open("a", encoding="utf-8") as table:
            table.write(f"{row}\n")


def timeless(text: str) -> str:
    """Without what is looked at again at the end: how long something has been so, and whom it has ended since."""
    return re.sub(r"\([\d.]+ m?s\)|: this ended rank \d+", "", text)


def check(launcher: str, name: str, folder: Path) -> None:
    """Run a defect under watch and look at what is said of it, and when."""
    said = DEFECTS[name]
    launch = {"torchrun": torchrun, "mpirun": mpirun}[launcher]
    run = watch(launch("defects.py", name, n=said.n), folder)
    told = told_of(run.told["verdict"], run.told["findings"], name)
    keep(launcher, name, told, run.told_s)
    assert_right(told, name)
    assert timeless(told.text) in timeless(run.errors)
    assert run.told["exit_status"] == run.status
    assert (run.status == 0) == said.is_finding
    if said.is_finding:
        assert "✖" not in run.errors
    else:
        assert_in_time(run.told_s, said.within_s)


@needs_mpirun
def test_a_rank_of_mpirun_that_dies(tmp_path: Path) -> None:
    check("mpirun", "dies", tmp_path)


@pytest.mark.slow
def test_a_defect_and_a_healthy_program_where_methods_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOOK_VARIABLE, "patched")
    name, healthy = "gather_against_recv", tmp_path / "healthy"
    run = watch(torchrun("defects.py", name, n=DEFECTS[name].n), tmp_path)
    assert_right(told_of(run.told["verdict"], run.told["findings"], name), name)
    healthy.mkdir()
    right = watch(torchrun("healthy.py", "one_f_one_b", n=3), healthy)
    assert (right.status, right.told["verdict"], right.told["findings"]) == (0, None, []), right.errors
    for told in (run.told, right.told):
        assert {rank["hook"] for rank in told["ranks"]} == {"patched"}
    assert all(rank["ops"] for rank in right.told["ranks"])


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFECTS)
def test_every_defect_by_torchrun(name: str, tmp_path: Path) -> None:
    check("torchrun", name, tmp_path)


@pytest.mark.slow
@needs_mpirun
@pytest.mark.parametrize("name", DEFECTS)
def test_every_defect_by_mpirun(name: str, tmp_path: Path) -> None:
    check("mpirun", name, tmp_path)


@pytest.mark.slow
@needs_hosts
def test_a_link_that_is_cut(tmp_path: Path) -> None:
    """Of two hosts. The sender's system takes the message over, so that its program may even end."""
    with hosts(2) as network:
        run = watch(on_hosts(network, "defects.py", "cut_link"), tmp_path)
    verdict = run.told["verdict"]
    assert verdict, run.errors
    told = Told(verdict["kind"], verdict["ranks"], verdict["text"])
    keep("hosts", "cut_link", told, run.told_s)
    assert (told.kind, told.ranks[0]) == ("stalled link", 0)
    assert "the link 0→1" in told.text
    assert named_line(told, "cut_link")
    assert_in_time(run.told_s, TOLD_S)


@pytest.mark.slow
def test_a_send_that_nobody_waits_for(tmp_path: Path) -> None:
    """Whether it hangs is a race: the handle may be dropped before or after the message has left."""
    run = watch(torchrun("defects.py", "never_waited"), tmp_path)
    found = [run.told["verdict"], *run.told["findings"]]
    named = [one for one in found if one and "`send -> 1`" in one["text"]]
    assert named, run.errors
    assert named[0]["ranks"][0] == 0
    assert any(f"defects.py:{line}" in named[0]["text"] for line in named_lines("never_waited"))


# -- in cells


@pytest.fixture(scope="module")
def notebook(daemonized: IPython) -> Iterator[Kernel]:
    with within(daemonized), kernel() as found:
        found.run("%load_ext dinfer\nsession = dinfer.connect(n=3)\n%dinfer watch")
        found.run(KEEP_TOLD)
        yield found
        found.run("session.close()")


@pytest.fixture
def cells(notebook: Kernel) -> Kernel:
    """The engines have the text of the defects, whatever the test before has done to them."""
    notebook.run("session.recover()")
    notebook.run("%%px\nimport os\nos.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))")
    notebook.run(f"%%px\n{CELL}")
    notebook.run("%%px\nbegin()")
    return notebook


KEEP_TOLD = """told, source = [], session.watch()._engines
source._tell = lambda verdict, show=source._tell: (told.append(verdict), show(verdict))
"""
"""The session's verdict is of the moment: interrupting a cell changes it. That which was shown is kept here."""

TOLD = "{'kind': told[0].kind, 'ranks': list(told[0].ranks), 'text': told[0].sentence}"
FINDINGS = "[one.as_dict() for one in [*session.watch().findings, *session.watch().kv().diff()]]"


def told_under(found: Kernel, cell: Cell) -> bool:
    """Whether a verdict is shown under the cell within a while, also once it has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while "✖" not in cell.text and time.monotonic() < deadline:
        found.look(cell)
    return "✖" in cell.text


# A slow rank is told of all that was watched, so it comes first: later, all the others' ops are that, too.
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DEFECTS, key=lambda name: name != "slow"))
def test_every_defect_in_a_cell(name: str, cells: Kernel) -> None:
    said, before = DEFECTS[name], cells.value(FINDINGS)
    cells.run("told.clear()")
    began = time.monotonic()
    cell = cells.begin(f"%%px\n{name}()")
    verdict, seconds = None, None
    if said.is_finding:
        cells.finish(cell)
        assert not cell.error
        assert "✖" not in cell.text
    else:
        assert told_under(cells, cell), cell.text
        seconds = time.monotonic() - began
        if not cell.ended:
            cells.interrupt()
        cells.finish(cell)
        verdict = cells.value(TOLD)
        first = cell.text.partition("✖")[2]
        assert first.startswith(f" error: {verdict['text']}")
    told = told_of(verdict, [one for one in cells.value(FINDINGS) if one not in before], name)
    keep("%%px", name, told, seconds, "cell")
    assert_right(told, name, "cell")
    if seconds is not None:  # an exception ends a cell, and not its engine
        assert_in_time(seconds, TOLD_S if said.kind == "exception" else said.within_s)

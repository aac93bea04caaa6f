"""A notebook that a run's log was saved as, executed in a kernel: its run ends where the first one stood."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import dinfer
from tests.support.twin import prompt

pytestmark = pytest.mark.notebook

LAST = "print([[list(stand.positions) for stand in run.standing().stands], run.tokens]); session.close()"


def test_a_saved_log_ends_where_the_run_stood(tmp_path: Path) -> None:
    with dinfer.connect("threads", n=3) as session:
        session.load("demo", threads=1)
        run = session.prefill(prompt(60), chunk_size=8, max_new_tokens=6)
        run.pause()
        run.break_at(layer=4, chunk=6)
        run.inject("bitflip", rank=2, layer=3, chunk=7)
        run.resume()
        run.wait(120)
        run.decode(5)
        run.step_back("token", 2)
        run.undo()
        run.undo()
        run.step("layer")
        wanted = [[list(stand.positions) for stand in run.standing().stands], run.tokens]
        path = run.calls.save(tmp_path / "replay.ipynb")
    book = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    book.cells.append(nbformat.v4.new_code_cell(LAST))  # type: ignore[no-untyped-call]
    NotebookClient(book, timeout=240, kernel_name="python3").execute()
    said = "".join(out["text"] for out in book.cells[-1]["outputs"] if out["output_type"] == "stream")
    assert said.strip() == str(wanted)

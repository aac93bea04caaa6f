"""What a kernel shows of an error that is an answer: on threads, which need no cluster."""

from __future__ import annotations

import nbformat

from tests.support.notebook_pages import executed

CELLS = {
    "begin": """
import dinfer
session = dinfer.connect("threads", 2).load("demo")
run = session.prefill("The code of Lima is 471.", chunk_size=4, paused=True)
""",
    "one": 'run.step("foo")',
    "several": "before = 1\nmore = 2\nrun.kv(layer=99)\nafter = 3",
    "whole": "%tb verbose",
    "close": "session.close()",
}


def test_the_user_s_line_and_the_message() -> None:
    notebook = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call]
    for tag, source in CELLS.items():
        cell = nbformat.v4.new_code_cell(source)  # type: ignore[no-untyped-call]
        cell.metadata["tags"] = [tag, *["raises-exception"] * (tag in ("one", "several"))]
        notebook.cells.append(cell)
    page = executed(notebook)
    for tag, line, said in (
        ("one", '----> 1 run.step("foo")', "PlanError: 'foo' is not a unit to step by; use one of "),
        ("several", "----> 3 run.kv(layer=99)", "PlanError: there is no layer 99: the layers are 0 to 5."),
    ):
        shown = page.text(tag)
        assert line in shown
        assert said in shown
        assert "dinfer/" not in shown
        assert len(shown.splitlines()) <= 7
    assert "dinfer/plan/partition.py" in page.text("whole")

"""What calls return, as a notebook shows it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

import dinfer
from dinfer.display import Displayable, DisplayableText, Table
from dinfer.files import WrittenPath
from dinfer.results import Moved, Where
from dinfer.verdict.verdict import Verdict

LINE = "rank 0: received block c2 l1 from <2>"


@pytest.mark.parametrize(
    "said",
    [Moved(((0,),), ((1,),), False, (LINE,)), Where("paused", LINE), Verdict("paused", LINE)],
    ids=lambda said: type(said).__name__,
)
def test_its_html_is_its_text_escaped_and_breaks_between_words(said: Displayable | Verdict) -> None:
    html = said._repr_html_()
    assert str(said).replace("<", "&lt;").replace(">", "&gt;") in html
    for rule in ("white-space:pre-wrap", "overflow-wrap:break-word", "word-break:normal"):
        assert rule in html


def test_a_table_aligns_numbers_to_the_right_and_keeps_what_cells_say() -> None:
    table = Table(("rank", "[text]", "s"), [(0, "中文 [red]", "1.5"), (10, "<b>", "-")])
    assert str(table).splitlines() == [
        "rank  [text]        s",
        "   0  中文 [red]  1.5",
        "  10  <b>           -",
    ]
    assert "<th>[text]</th>" in table._repr_html_()
    assert "<td>&lt;b&gt;</td>" in table._repr_html_()


def test_a_table_does_not_break_lines_and_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table = Table(("", ""), [("word " * 100, "end"), ("more", "end")], shown=1)
    assert len(table) == 2
    shown, more = str(table).splitlines()
    assert shown.endswith("end")
    assert "1 more" in more


@pytest.fixture
def shell() -> Iterator[Any]:
    """An IPython shell that knows dinfer."""
    made = InteractiveShell.instance()
    made.user_ns["dinfer"] = dinfer
    yield made
    if "session" in made.user_ns:
        made.user_ns["session"].close()
    InteractiveShell.clear_instance()


def test_a_text_is_shown_without_quotation_marks_and_stays_a_text(shell: Any) -> None:
    text = DisplayableText("all ranks have met again; <2>")
    shown, _ = shell.display_formatter.format(text)
    assert shown["text/plain"] == "all ranks have met again; <2>"
    assert "all ranks have met again; &lt;2&gt;" in shown["text/html"]
    assert text == "all ranks have met again; <2>"
    assert text.startswith("all ")
    assert json.loads(json.dumps([text])) == [text]
    assert pickle.loads(pickle.dumps(text)) == text


def test_a_session_is_told_once_by_the_cell_that_makes_it(
    shell: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(code: str) -> int:
        capsys.readouterr()
        shell.run_cell(code, store_history=True)
        return capsys.readouterr().out.count("no checkpoint yet")

    assert shown("session = dinfer.connect('threads', 1)\nsession") == 1
    assert shown("session") == 1
    assert shown("session.close(); session = dinfer.connect('threads', 1)") == 1
    assert shown("session.close()\ndinfer.connect('threads', 1)") == 1
    shell.user_ns["session"] = shell.user_ns["_"]


def test_what_was_written_is_shown_as_its_path_and_as_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert repr(WrittenPath("out") / "a b.html") == "out/a b.html"
    link = '<a href="out/a%20b.html" target="_blank">'
    assert WrittenPath("out/a b.html")._repr_html_() == f"{link}out/a b.html</a>"
    inside, outside = tmp_path / "out" / "a b.html", tmp_path.parent / "<x>.html"
    assert WrittenPath(inside)._repr_html_() == f"{link}{inside}</a>"
    assert WrittenPath(outside)._repr_html_() == str(outside).replace("<", "&lt;").replace(">", "&gt;")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert WrittenPath("x.html")._repr_html_() == "x.html"

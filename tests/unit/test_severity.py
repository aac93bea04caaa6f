"""The scale of severity: each level has a word, an icon and colours of its own, and panel and report have them all."""

from __future__ import annotations

import io
import re
from itertools import combinations
from pathlib import Path

import pytest
from IPython.lib.pretty import pretty

import dinfer.views
from dinfer.display import DisplayableText, badge, html_text, takes_colour
from dinfer.errors import DinferError
from dinfer.kv.difference import Diff
from dinfer.plan.ops import NothingYet, PlanError
from dinfer.results import Where
from dinfer.severity import Severity, style_variables
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.waits import KINDS
from dinfer.views.panel.panel import Panel
from dinfer.views.report.page import COLOURS
from tests.unit.views.test_shown import luminance

VIEWS = Path(dinfer.views.__file__).parent
READABLE = 4.5
"""the contrast of text that WCAG 2.2 asks for (1.4.3)"""


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_no_two_levels_share_a_sign() -> None:
    for one, other in combinations(Severity, 2):
        assert one < other
        assert one.word != other.word
        assert one.icon != other.icon
        assert one.painted("x") != other.painted("x")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("level", Severity)
def test_every_level_can_be_read(level: Severity, dark: bool) -> None:
    tint = level.tint(dark=dark)
    assert contrast(tint.text, tint.back) >= READABLE
    assert f"--dinfer-{level.word}-text: {tint.text};" in style_variables(dark=dark)


def test_in_text_only_what_is_grave_is_marked() -> None:
    assert [level.marked("x") for level in Severity] == ["x", "x", "⚠ warning: x", "✖ error: x"]
    assert Severity.ERROR.marked("") == ""
    assert "\x1b[" in Severity.ERROR.marked("x", colour=True)


@pytest.mark.parametrize("level", Severity)
def test_panel_and_report_have_every_level(level: Severity) -> None:
    rule = re.compile(
        rf'\[data-severity="{level.word}"\] {{ color: var\(--dinfer-{level.word}-text\);'
        rf" background: var\(--dinfer-{level.word}-back\); }}"
    )
    report = COLOURS + (VIEWS / "report" / "report.css").read_text(encoding="utf-8")
    for style in (Panel._css, report):
        assert rule.search(style)
        assert style.count(f"--dinfer-{level.word}-text: #") == 2, "for light pages and for dark ones"


def test_a_cell_shows_the_badge_before_the_text() -> None:
    wrong = Where("hung", "rank 0: <here>", Severity.ERROR)
    assert wrong._repr_html_() == html_text("hung\nrank 0: <here>", Severity.ERROR)
    assert "✖ error</span> hung\nrank 0: &lt;here&gt;" in wrong._repr_html_()
    assert badge(Severity.NOTE) == ""
    assert "span" not in DisplayableText("saved")._repr_html_()


def test_findings_have_a_level() -> None:
    assert Diff("all ranks hold the same", (), 0).severity == Severity.OK
    levels = {kind: Verdict(kind, "…").severity for kind in KINDS}
    assert {levels[kind] for kind in ("cycle", "dead", "stalled link", "exception")} == {Severity.ERROR}
    assert {levels[kind] for kind in ("computing", "slow rank", "slow link")} == {Severity.WARNING}
    assert {levels[kind] for kind in ("moving", "paused", "done")} == {Severity.NOTE}


def test_errors_have_a_level() -> None:
    assert (DinferError.severity, PlanError("…").severity) == (Severity.ERROR, Severity.ERROR)
    assert NothingYet("no block is on ranks 0 and 1 yet").severity == Severity.NOTE


def test_colours_are_for_terminals_whose_user_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not takes_colour(stream)
    monkeypatch.setattr(stream, "isatty", lambda: True)
    assert takes_colour(stream)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not takes_colour(stream)


def test_a_console_shows_the_mark_of_what_is_grave() -> None:
    wrong = Where("hung", "rank 0: here", Severity.ERROR)
    assert pretty(wrong) == "✖ error: hung\nrank 0: here"  # type: ignore[no-untyped-call]
    assert pretty(Where("paused", "rank 0: here")) == "paused\nrank 0: here"  # type: ignore[no-untyped-call]
    assert repr(wrong) == str(wrong) == "hung\nrank 0: here"

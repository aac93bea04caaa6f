"""The figure of bench --compare, and the file that it becomes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from dinfer.bench.figure import PlotError, check_ending, figure, write


@pytest.fixture
def result() -> dict[str, Any]:
    """Two cases of two strategies, as `compare` gives them."""
    cases = [
        {
            "tokens": 2048,
            "chunk_size": size,
            "seconds": {"pairwise": [1.0, 2.0, 4.0], "ring": [3.0, 3.5, 5.0]},
            "medians": {"pairwise": 2.0, "ring": 3.5},
        }
        for size in (64, 128)
    ]
    return {"strategies": ["pairwise", "ring"], "cases": cases, "verdict": "Use pairwise: " + "because " * 30}


def test_bars_are_medians_and_whiskers_reach_the_extremes(result: dict[str, Any]) -> None:
    first, second = figure(result).data
    assert (first.name, second.name) == ("pairwise", "ring")
    assert list(second.y) == [3.5, 3.5]
    assert [list(row) for row in first.x] == [["2,048 tokens"] * 2, ["by 64", "by 128"]]
    assert list(first.error_y.array) == [2.0, 2.0]
    assert list(first.error_y.arrayminus) == [1.0, 1.0]
    assert "Use pairwise: because" in figure(result).layout.title.text


def test_html_loads_nothing_and_uploads_nothing(result: dict[str, Any], tmp_path: Path) -> None:
    text = write(figure(result), tmp_path / "plot.html").read_text(encoding="utf-8")
    assert '"showSendToCloud": false' in text
    assert not re.search(r'"plotlyServerURL": "[^"]', text)  # the empty one of the config is left out
    assert not re.search(r"<(script|link|img|iframe)\b[^>]*\b(src|href)=", text)
    assert len(text) > 1_000_000  # plotly.js itself


def test_a_picture_that_cannot_be_drawn_becomes_html(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_browser(*_: object, **__: object) -> bytes:
        raise RuntimeError("no Chrome here\nat all")

    monkeypatch.setattr(go.Figure, "to_image", no_browser)
    with pytest.raises(PlotError, match=r"Chrome or Chromium .*RuntimeError: no Chrome here\)") as told:
        write(figure(result), tmp_path / "plot.svg")
    assert str(tmp_path / "plot.html") in str(told.value)
    assert (tmp_path / "plot.html").is_file()


def test_a_picture_is_what_the_browser_drew(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(go.Figure, "to_image", lambda _, format, **__: f"<{format}>".encode())
    assert write(figure(result), tmp_path / "plot.SVG").read_bytes() == b"<svg>"


def test_an_ending_is_judged_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ending("plot.HTML")
    with pytest.raises(PlotError, match=r"plot is 'plot.pdf'; it must end in .html, .svg, .png"):
        check_ending("plot.pdf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PlotError, match=r"needs the package kaleido .* ends in .html"):
        check_ending("plot.png")

"""The plot of `dinfer bench --compare`: a plotly figure of its result, and figures as files."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from dinfer.errors import DinferError
from dinfer.files import make_folder
from dinfer.views.figures.style import html_config

ENDINGS = (".html", ".svg", ".png")


class PlotError(DinferError, ValueError):
    """A plot file that cannot be written; the message says what to do."""


def figure(result: Mapping[str, Any]) -> go.Figure:
    """Median seconds of each strategy by prompt length and chunk size, with whiskers from the fastest to the slowest
    round."""
    cases = result["cases"]
    sizes = [[f"{case['tokens']:,} tokens" for case in cases], [f"by {case['chunk_size']}" for case in cases]]
    bars = [_bars(name, sizes, cases) for name in result["strategies"]]
    shown = go.Figure(bars)
    shown.update_layout(
        title={"text": _wrapped(result["verdict"]), "font": {"size": 13}},
        yaxis={"title": {"text": "prefill, seconds (median)"}, "rangemode": "tozero"},
        barmode="group",
        template="plotly_white",
        margin={"t": 110},
    )
    return shown


def check_ending(path: str | Path) -> None:
    """Raises PlotError for a file that could not be written; called before anything is measured."""
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise PlotError(f"plot is {str(path)!r}; it must end in {', '.join(ENDINGS)}.")
    if ending != ".html" and importlib.util.find_spec("kaleido") is None:
        raise PlotError(
            f"plot is {str(path)!r}; drawing {ending} needs the package kaleido (pip install kaleido) and Chrome or "
            "Chromium. A file that ends in .html needs neither."
        )


def write(shown: go.Figure, path: str | Path) -> Path:
    """Write the figure; returns the path. HTML files are self-contained.

    Raises PlotError if a picture cannot be drawn, after writing the figure as HTML instead; OSError.
    """
    path = make_folder(path)
    if path.suffix.lower() == ".html":
        path.write_text(shown.to_html(include_plotlyjs=True, config=html_config()), encoding="utf-8")
        return path
    try:
        drawn = shown.to_image(format=path.suffix.lower()[1:], width=900, height=520)
    except Exception as error:  # whatever kaleido and its browser raise
        instead = write(shown, path.with_suffix(".html"))
        raise PlotError(
            f"{path} could not be drawn, which needs a working Chrome or Chromium "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}). "
            f"The plot is in {instead}."
        ) from error
    path.write_bytes(drawn)
    return path


def _bars(name: str, sizes: Sequence[Sequence[str]], cases: Sequence[Mapping[str, Any]]) -> go.Bar:
    medians = [case["medians"][name] for case in cases]
    rounds = [case["seconds"][name] for case in cases]
    return go.Bar(
        name=name,
        x=sizes,
        y=medians,
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [max(took) - middle for took, middle in zip(rounds, medians, strict=True)],
            "arrayminus": [middle - min(took) for took, middle in zip(rounds, medians, strict=True)],
        },
    )


def _wrapped(text: str, width: int = 110) -> str:
    """The text with plotly's line breaks."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(lines)

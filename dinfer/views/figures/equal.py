"""Equal: figures of one kind, of several runs, on the same scales, so that what looks longer is longer."""

from collections.abc import Iterator, Sequence
from math import isclose, log10
from typing import Any

import plotly.graph_objects as go

from dinfer.views.figures.style import link_line, link_marker

MOST_DECADES = 2.2
"""of a logarithmic axis whose labels are not only powers of ten"""


def make_equal(figures: Sequence[go.Figure]) -> None:
    """Give these figures the same ranges of their axes, the same colours for the same values, and each link the same
    colour. Axes that list things, such as lanes, stay as they are."""
    for axes in zip(*(_axes(figure) for figure in figures), strict=False):
        if all(axis.range is not None and (axis.type == "log" or not axis.ticktext) for axis in axes):
            _make_axes_equal(axes)
    for heats in zip(*(_heatmaps(figure) for figure in figures), strict=False):
        known = [value for heat in heats for row in heat.z for value in row if value is not None]
        for heat in heats if known else ():
            heat.zmin, heat.zmax = min(known), max(known)
    links = sorted({trace.name for figure in figures for trace in figure.data if "→" in (trace.name or "")})
    for figure in figures:
        for trace in figure.data:
            if trace.name in links:
                number = links.index(trace.name)
                if trace.mode == "markers":
                    trace.marker.update(link_marker(number, len(links)))
                else:
                    trace.line.update(link_line(number))


def _axes(figure: go.Figure) -> Iterator[Any]:
    yield from figure.select_xaxes()
    yield from figure.select_yaxes()


def _heatmaps(figure: go.Figure) -> list[Any]:
    return [trace for trace in figure.data if trace.type == "heatmap"]


def _make_axes_equal(axes: Sequence[Any]) -> None:
    """The union of their ranges and, on logarithmic axes, of their labels."""
    ends = min(axis.range[0] for axis in axes), max(axis.range[1] for axis in axes)
    ticks = {
        value: text
        for axis in axes
        for value, text in zip(axis.tickvals or (), axis.ticktext or (), strict=True)
    }
    shown = sorted(ticks)
    if ends[1] - ends[0] > MOST_DECADES:
        shown = [value for value in shown if isclose(log10(value), round(log10(value)), abs_tol=1e-9)]
    for axis in axes:
        axis.range = ends
        if ticks:
            axis.tickvals, axis.ticktext = shown, [ticks[value] for value in shown]

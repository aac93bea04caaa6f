"""Picture: a plotly figure as SVG without script, for pages where nothing draws plotly's data: nbconvert, GitHub.

It draws what dinfer's figures are made of: points, lines, stacked bars and heatmaps, on linear, logarithmic and
category axes. Pure: a figure in, text out.
"""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

import plotly.graph_objects as go

from dinfer.views.figures.axes import Axis, Tick, axis_of, layout_of, ticks_of
from dinfer.views.figures.marks import fill_of, marks, points, text_at
from dinfer.views.figures.style import EITHER

WIDTH = 900
MARGIN = {"l": 60, "r": 20, "t": 50, "b": 45}
TEXT, GRID, _ = EITHER
LETTER = 6.2
"""the pixels of a letter, about"""
LINE = 18
"""of the legend"""


class Frame(NamedTuple):
    """Where the plots lie, in pixels."""

    left: float
    right: float
    top: float
    bottom: float

    def across(self, part: float) -> float:
        return self.left + part * (self.right - self.left)

    def down(self, part: float) -> float:
        """`part` is plotly's, from below."""
        return self.bottom - part * (self.bottom - self.top)


def svg(figure: go.Figure, width: int = WIDTH) -> str:
    """The figure on the page's own background, light or dark, as high as its layout says, or higher where its legend
    takes more than a line."""
    left = _left(figure)
    legend = list(_legend(figure, left, width))
    more = LINE * max((entry.line for entry in legend), default=0)
    height = int(figure.layout.height or 450) + more
    frame = _frame(figure, left, more, width, height)
    axes = _axes(figure, frame)
    back = "".join(_drawn_axes(figure, frame, axes))
    drawn = "".join(marks(trace, *_own(trace, axes), figure) for trace in figure.data)
    words = "".join((*map(_entry, legend), *_annotations(figure, frame)))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="{TEXT}">'
        f"{back}{drawn}{words}</svg>"
    )


def _left(figure: go.Figure) -> float:
    """Room for what is written beside the vertical axes."""
    longest = max((len(str(name)) for name in _names(figure)), default=0)
    return max(_margin(figure)["l"], longest * LETTER + 34)


def _margin(figure: go.Figure) -> dict[str, float]:
    given = figure.layout.margin
    return {name: most if given[name] is None else given[name] for name, most in MARGIN.items()}


def _frame(figure: go.Figure, left: float, more: int, width: int, height: int) -> Frame:
    margin = _margin(figure)
    scale = (
        70 if any(trace.type == "heatmap" and trace.showscale is not False for trace in figure.data) else 0
    )
    return Frame(left, width - margin["r"] - scale, margin["t"] + more, height - margin["b"])


def _names(figure: go.Figure) -> Iterator[Any]:
    """What is written beside the vertical axes, but for plain numbers."""
    for name in {trace.yaxis or "y" for trace in figure.data}:
        yield from layout_of(figure, name).ticktext or ()
    if figure.layout.yaxis.type == "category":
        yield from (name for trace in figure.data[:1] for name in trace.y)


def _axes(figure: go.Figure, frame: Frame) -> dict[str, Axis]:
    found = {}
    for name in dict.fromkeys(
        name for trace in figure.data for name in (trace.xaxis or "x", trace.yaxis or "y")
    ):
        begin, end = layout_of(figure, name).domain or (0, 1)
        place = frame.across if name[0] == "x" else frame.down
        found[name] = axis_of(figure, name, place(begin), place(end))
    return found


def _own(trace: Any, axes: dict[str, Axis]) -> tuple[Axis, Axis]:
    return axes[trace.xaxis or "x"], axes[trace.yaxis or "y"]


# -- around the plots


def _drawn_axes(figure: go.Figure, frame: Frame, axes: dict[str, Axis]) -> Iterator[str]:
    for name, axis in axes.items():
        layout = layout_of(figure, name)
        other = axes.get(layout.anchor or "") or axes["y" if name[0] == "x" else "x"]
        ticks = ticks_of(figure, name, axis)
        if layout.showgrid is not False:
            yield _grid(name, [pixel for pixel, _ in ticks], other.begin, other.end)
        if layout.showticklabels is not False:
            yield from _labels(name, _apart(name, ticks), other.begin, int(layout.tickfont.size or 12))
        if layout.title.text and layout.showticklabels is not False:
            yield _title(name, layout.title.text, axis, other, frame)


def _grid(name: str, pixels: Sequence[float], begin: float, end: float) -> str:
    low, high = sorted((begin, end))
    lines = [
        f"M{p:.1f} {low:.1f}V{high:.1f}" if name[0] == "x" else f"M{low:.1f} {p:.1f}H{high:.1f}"
        for p in pixels
    ]
    return f'<path class="grid" d="{"".join(lines)}" stroke="{GRID}"/>'


def _apart(name: str, ticks: list[Tick]) -> list[Tick]:
    """Those that do not lie over the one before."""
    kept = list[Tick]()
    for pixel, text in ticks:
        room = LETTER * (len(text) + 1) if name[0] == "x" else 8
        if not kept or abs(pixel - kept[-1][0]) >= room:
            kept.append((pixel, text))
    return kept


def _labels(name: str, ticks: list[Tick], edge: float, size: int) -> Iterator[str]:
    for pixel, text in ticks:
        if name[0] == "x":
            yield text_at(pixel, edge + 15, text, "middle", size)
        else:
            yield text_at(edge - 6, pixel + 0.35 * size, text, "end", size)


def _title(name: str, text: str, axis: Axis, other: Axis, frame: Frame) -> str:
    middle = (axis.begin + axis.end) / 2
    if name[0] == "x":
        return text_at(middle, other.begin + 33, text, "middle")
    left = min(other.begin - 44, frame.left - 44)
    return _turned(left, middle, -90, text)


class Entry(NamedTuple):
    """One of the legend, of a trace, at a place of a line."""

    x: float
    line: int
    trace: Any


def _legend(figure: go.Figure, left: float, width: int) -> Iterator[Entry]:
    """Above all, each name once."""
    named = {trace.name: trace for trace in figure.data if trace.name and trace.showlegend is not False}
    if len(named) < 2 or any(trace.type == "heatmap" for trace in figure.data):
        return
    x, line, order = left, 0, list(named.values())
    for trace in reversed(order) if figure.layout.legend.traceorder == "reversed" else order:
        wide = 34 + LETTER * len(trace.name)
        if x + wide > width and x > left:
            x, line = left, line + 1
        yield Entry(x, line, trace)
        x += wide


def _entry(entry: Entry) -> str:
    x, trace, y = entry.x, entry.trace, 14.5 + LINE * entry.line
    if trace.type == "bar":
        mark = f'<path d="M{x:.0f} {y - 5.5}h11v11h-11z" fill="{fill_of(trace)}"/>'
    elif trace.mode == "lines":
        wide = min(9, trace.line.width or 2)
        mark = f'<path d="M{x:.0f} {y}h11" stroke="{trace.line.color}" stroke-width="{wide:g}"/>'
    else:
        mark = points(trace.marker.symbol, trace.marker.color, [(x + 5, y)])
    return mark + text_at(x + 16, y + 4.5, trace.name)


def _annotations(figure: go.Figure, frame: Frame) -> Iterator[str]:
    """The titles of rows and columns."""
    for one in figure.layout.annotations:
        x, y = frame.across(one.x), frame.down(one.y)
        if one.textangle:
            yield _turned(x + 6, y, one.textangle, one.text)
        else:
            yield text_at(x, y - 7, one.text, "middle")


def _turned(x: float, y: float, angle: float, text: str) -> str:
    place = f'transform="translate({x:.1f} {y:.1f}) rotate({angle:g})"'
    return f'<text {place} text-anchor="middle">{escape(text)}</text>'

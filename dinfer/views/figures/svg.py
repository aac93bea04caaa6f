"""A plotly figure as SVG without script, for pages that cannot draw plotly's data: nbconvert, GitHub.

Supports what dinfer's figures consist of: points, lines, stacked bars and heatmaps, on linear, logarithmic and
category axes. Pure: a figure in, text out.
"""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise
from math import ceil, floor, log10
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from dinfer.views.figures.style import EITHER

MOST_TICKS = 6

Tick = tuple[float, str]
"""position in pixels, and label"""


class Axis(NamedTuple):
    """An axis on which `low` lies at the pixel `begin`, and `high` at `end`. On a logarithmic axis, these two are
    exponents of ten; on a category axis, indices."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool
    categories: tuple[str, ...]

    def at(self, value: Any) -> float:
        """The pixel of a value; NaN for NaN."""
        if self.categories:
            value = self.categories.index(str(value))
        elif self.is_log:
            value = log10(value) if value > 0 else self.low
        return self.begin + (float(value) - self.low) / (self.high - self.low) * (self.end - self.begin)

    @property
    def step(self) -> float:
        """The width of a category in pixels."""
        return abs(self.end - self.begin) / abs(self.high - self.low)


def axis_of(figure: go.Figure, name: str, begin: float, end: float) -> Axis:
    """The axis `name`, such as "x" or "y2", between two pixels."""
    layout = layout_of(figure, name)
    is_log = layout.type == "log"
    values = _values(figure, name)
    categories = tuple(dict.fromkeys(map(str, values))) if layout.type == "category" else ()
    if layout.range is not None:
        low, high = map(float, layout.range)
    elif layout.type == "category":
        low, high = -0.5, max(1, len(categories)) - 0.5
    else:
        low, high = _around(values)
    if layout.autorange == "reversed":
        low, high = high, low
    return Axis(low, high if high != low else low + 1, begin, end, is_log, categories)


def ticks_of(figure: go.Figure, name: str, axis: Axis) -> list[Tick]:
    """The ticks of an axis."""
    layout = layout_of(figure, name)
    if layout.type == "category":
        return [(axis.at(category), category) for category in axis.categories]
    if layout.tickvals is not None:
        named = zip(layout.tickvals, layout.ticktext, strict=True)
        return [(axis.at(value), str(text)) for value, text in named if _is_within(axis, value)]
    return [(axis.at(value), f"{value:.6g}{layout.ticksuffix or ''}") for value in _round_values(axis)]


def layout_of(figure: go.Figure, name: str) -> Any:
    """The layout of an axis."""
    return figure.layout[f"{name[0]}axis{name[1:]}"]


def _values(figure: go.Figure, name: str) -> Sequence[Any]:
    """All values on the axis and on the axes that match it."""
    group = {name, layout_of(figure, name).matches or name}
    group |= {one for one in _axis_names(figure, name[0]) if layout_of(figure, one).matches in group}
    found = [getattr(trace, name[0]) for trace in figure.data if _axis_name(trace, name[0]) in group]
    return [value for some in found if some is not None for value in some]


def _axis_names(figure: go.Figure, letter: str) -> Iterable[str]:
    return {_axis_name(trace, letter) for trace in figure.data}


def _axis_name(trace: Any, letter: str) -> str:
    return trace[f"{letter}axis"] or letter


def _around(values: Sequence[Any]) -> tuple[float, float]:
    some = np.array([value for value in values if value is not None], np.float64)
    some = some[np.isfinite(some)]
    if not len(some):
        return 0.0, 1.0
    low, high = min(0.0, float(some.min())), float(some.max())
    return low, high + 0.03 * (high - low)


def _is_within(axis: Axis, value: float) -> bool:
    pixel = axis.at(value)
    return min(axis.begin, axis.end) - 1 <= pixel <= max(axis.begin, axis.end) + 1


def _round_values(axis: Axis) -> list[float]:
    """At most about MOST_TICKS values, a round number apart."""
    low, high = sorted((axis.low, axis.high))
    rough = (high - low) / MOST_TICKS
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [number * step for number in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


SMALLEST = 6
"""the smallest font size"""

BAR = 0.8
"""the width of a bar, as part of its category"""

SHAPES = {
    "square": "m-2.5-2.5h5v5h-5z",
    "diamond": "m-3.2 0l3.2-3.2 3.2 3.2-3.2 3.2z",
    "triangle-up": "m-3 2.4l3-5.2 3 5.2z",
    "triangle-down": "m-3-2.4l3 5.2 3-5.2z",
    "cross": "m-3-1h2v-2h2v2h2v2h-2v2h-2v-2h-2z",
    "x": "m-3-2l1-1 2 2 2-2 1 1-2 2 2 2-1 1-2-2-2 2-1-1 2-2z",
    "star": "m0-3.5l1 2.5h2.6l-2 1.6.8 2.6-2.4-1.6-2.4 1.6.8-2.6-2-1.6h2.6z",
}
"""paths from the middle of a point; a circle is a line of no length with round ends"""


def text_at(
    x: float, y: float, text: str, anchor: str = "start", size: int = 12, colour: str = "", around: str = ""
) -> str:
    about = f' text-anchor="{anchor}"' * (anchor != "start") + f' font-size="{size}"' * (size != 12)
    about += f' fill="{colour}"' * bool(colour)
    about += f' stroke="{around}" stroke-width="4" paint-order="stroke"' * bool(around)
    return f'<text x="{x:.1f}" y="{y:.1f}"{about}>{escape(text)}</text>'


def marks(trace: Any, x: Axis, y: Axis, figure: go.Figure) -> str:
    """One trace of the figure, on its axes."""
    if trace.type == "heatmap":
        return "".join(_heatmap(trace, x, y))
    if trace.type == "bar":
        return "".join(_bars(trace, x, y, figure))
    if trace.mode == "lines":
        return _line(trace, x, y)
    places = [(x.at(one), y.at(other)) for one, other in zip(trace.x, trace.y, strict=True)]
    return points(trace.marker.symbol, trace.marker.color, places)


def points(symbol: str, colour: str, places: Sequence[tuple[float, float]]) -> str:
    """A plotly symbol at each of these places."""
    if symbol in SHAPES:
        path = "".join(f"M{x:.1f} {y:.1f}{SHAPES[symbol]}" for x, y in places)
        return f'<path d="{path}" fill="{colour}"/>'
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
    return f'<path d="{path}" stroke="{colour}" stroke-width="5" stroke-linecap="round"/>'


def _line(trace: Any, x: Axis, y: Axis) -> str:
    """A line with gaps at NaN; in steps if its shape says so."""
    path, before, steps = list[str](), False, trace.line.shape == "hv"
    for one, other in zip(trace.x, trace.y, strict=True):
        across, down = x.at(one), y.at(other)
        if across != across or down != down:
            before = False
            continue
        joint = f"H{across:.1f}V{down:.1f}" if steps else f"L{across:.1f} {down:.1f}"
        path.append(joint if before else f"M{across:.1f} {down:.1f}")
        before = True
    width = f"{trace.line.width or 2:g}"
    return f'<path d="{"".join(path)}" fill="none" stroke="{trace.line.color}" stroke-width="{width}"/>'


def _bars(trace: Any, x: Axis, y: Axis, figure: go.Figure) -> Iterator[str]:
    """Horizontal bars, stacked on those of the traces before."""
    before = figure.data[: list(figure.data).index(trace)]
    high, fill = y.step * BAR, fill_of(trace)
    if fill != trace.marker.color:
        yield _stripes(trace)
    for n, (name, long) in enumerate(zip(trace.y, trace.x, strict=True)):
        begin = sum(float(other.x[n]) for other in before)
        left, right, middle = x.at(begin), x.at(begin + long), y.at(name)
        box = f'x="{left:.1f}" y="{middle - high / 2:.1f}" width="{right - left:.1f}" height="{high:.1f}"'
        yield f'<rect class="bar" {box} fill="{fill}"><title>{escape(trace.name)}</title></rect>'
        if trace.text[n]:
            around = "" if fill == trace.marker.color else trace.marker.color
            on = _on(trace.marker.color)
            yield text_at((left + right) / 2, middle + 4, trace.text[n], "middle", colour=on, around=around)


def fill_of(trace: Any) -> str:
    """The fill of a bar: its colour or stripes."""
    return f"url(#{_id(trace)})" if trace.marker.pattern.shape else trace.marker.color


def _id(trace: Any) -> str:
    return "dinfer-" + "".join(letter if letter.isalnum() else "-" for letter in trace.name)


def _stripes(trace: Any) -> str:
    line = trace.marker.pattern.fgcolor
    return (
        f'<pattern id="{_id(trace)}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<path d="M0 0h8v8h-8z" fill="{trace.marker.color}"/>'
        f'<path d="M-2 2l4-4M0 8l8-8M6 10l4-4" stroke="{line}" stroke-width="2"/></pattern>'
    )


def _heatmap(trace: Any, x: Axis, y: Axis) -> Iterator[str]:
    values = [value for row in trace.z for value in row if value is not None]
    if not values:
        return
    low, high = min(values), max(values)
    gap = trace.xgap or 0
    for name, row, texts in zip(trace.y, trace.z, trace.text, strict=True):
        for column, value, text in zip(trace.x, row, texts, strict=True):
            if value is None:
                continue
            colour = _of_scale(trace, (value - low) / (high - low) if high > low else 0.5)
            across, down = x.at(column), y.at(name)
            wide, tall = x.step - gap, y.step - gap
            box = f'x="{across - wide / 2:.1f}" y="{down - tall / 2:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
            yield f'<rect class="cell" {box} fill="{colour}"><title>{escape(text)}</title></rect>'
            size = int(min(12, (wide - 2) / max(1, 0.55 * len(text))))
            if trace.texttemplate and size >= SMALLEST:
                yield text_at(across, down + 4, text, "middle", size, _on(colour))
    if trace.showscale is not False:
        yield from _scale(trace, x, y, low, high)


def _scale(trace: Any, x: Axis, y: Axis, low: float, high: float) -> Iterator[str]:
    """The colour bar, from the smallest value at the bottom to the largest."""
    left, top, tall = x.end + 16, min(y.begin, y.end), abs(y.end - y.begin)
    parts = [n / 32 for n in range(33)]
    for one, next_one in pairwise(parts):
        box = f'y="{top + (1 - next_one) * tall:.1f}" height="{tall / 32 + 0.5:.1f}"'
        yield f'<rect x="{left:.1f}" width="12" {box} fill="{_of_scale(trace, one)}"/>'
    yield text_at(left + 16, top + 10, f"{high:.3g}")
    yield text_at(left + 16, top + tall, f"{low:.3g}")
    yield text_at(left + 16, top + tall / 2, trace.colorbar.title.text or "")


def _of_scale(trace: Any, part: float) -> str:
    return str(sample_colorscale(list(map(list, trace.colorscale)), [part])[0])


def _on(colour: str) -> str:
    """Black or white, whichever contrasts more with that colour."""
    if colour.startswith("#"):
        red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    else:
        red, green, blue = (int(float(part)) for part in colour[4:-1].split(","))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


WIDTH = 900

MARGIN = {"l": 60, "r": 20, "t": 50, "b": 45}

TEXT, GRID, _ = EITHER

LETTER = 6.2
"""approximate width of a letter, in pixels"""

LINE = 18
"""height of a line of the legend, in pixels"""


class PlotArea(NamedTuple):
    """The area of the plots, in pixels."""

    left: float
    right: float
    top: float
    bottom: float

    def across(self, part: float) -> float:
        return self.left + part * (self.right - self.left)

    def down(self, part: float) -> float:
        """`part`: plotly's, from the bottom."""
        return self.bottom - part * (self.bottom - self.top)


def svg(figure: go.Figure, width: int = WIDTH) -> str:
    """The figure as SVG on the page's background. It has the height of its layout, plus further lines of its legend."""
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
    """The space left of the plots, for the labels of vertical axes."""
    longest = max((len(str(name)) for name in _tick_labels(figure)), default=0)
    return max(_margin(figure)["l"], longest * LETTER + 34)


def _margin(figure: go.Figure) -> dict[str, float]:
    given = figure.layout.margin
    return {name: most if given[name] is None else given[name] for name, most in MARGIN.items()}


def _frame(figure: go.Figure, left: float, more: int, width: int, height: int) -> PlotArea:
    margin = _margin(figure)
    scale = (
        70 if any(trace.type == "heatmap" and trace.showscale is not False for trace in figure.data) else 0
    )
    return PlotArea(left, width - margin["r"] - scale, margin["t"] + more, height - margin["b"])


def _tick_labels(figure: go.Figure) -> Iterator[Any]:
    """The labels of vertical axes, except plain numbers."""
    for name in {trace.yaxis or "y" for trace in figure.data}:
        yield from layout_of(figure, name).ticktext or ()
    if figure.layout.yaxis.type == "category":
        yield from (name for trace in figure.data[:1] for name in trace.y)


def _axes(figure: go.Figure, frame: PlotArea) -> dict[str, Axis]:
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


def _drawn_axes(figure: go.Figure, frame: PlotArea, axes: dict[str, Axis]) -> Iterator[str]:
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
    """The ticks whose labels do not overlap the one before."""
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


def _title(name: str, text: str, axis: Axis, other: Axis, frame: PlotArea) -> str:
    middle = (axis.begin + axis.end) / 2
    if name[0] == "x":
        return text_at(middle, other.begin + 33, text, "middle")
    left = min(other.begin - 44, frame.left - 44)
    return _turned(left, middle, -90, text)


class LegendEntry(NamedTuple):
    """An entry of the legend, with its position."""

    x: float
    line: int
    trace: Any


def _legend(figure: go.Figure, left: float, width: int) -> Iterator[LegendEntry]:
    """The entries of the legend, each name once."""
    named = {trace.name: trace for trace in figure.data if trace.name and trace.showlegend is not False}
    if len(named) < 2 or any(trace.type == "heatmap" for trace in figure.data):
        return
    x, line, order = left, 0, list(named.values())
    for trace in reversed(order) if figure.layout.legend.traceorder == "reversed" else order:
        wide = 34 + LETTER * len(trace.name)
        if x + wide > width and x > left:
            x, line = left, line + 1
        yield LegendEntry(x, line, trace)
        x += wide


def _entry(entry: LegendEntry) -> str:
    x, trace, y = entry.x, entry.trace, 14.5 + LINE * entry.line
    if trace.type == "bar":
        mark = f'<path d="M{x:.0f} {y - 5.5}h11v11h-11z" fill="{fill_of(trace)}"/>'
    elif trace.mode == "lines":
        wide = min(9, trace.line.width or 2)
        mark = f'<path d="M{x:.0f} {y}h11" stroke="{trace.line.color}" stroke-width="{wide:g}"/>'
    else:
        mark = points(trace.marker.symbol, trace.marker.color, [(x + 5, y)])
    return mark + text_at(x + 16, y + 4.5, trace.name)


def _annotations(figure: go.Figure, frame: PlotArea) -> Iterator[str]:
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

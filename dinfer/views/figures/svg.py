"""A plotly figure as SVG without script, for pages that cannot draw plotly's data: nbconvert, GitHub.

Supports what dinfer's figures consist of: points, lines, stacked bars and heatmaps, on linear, logarithmic and
category axes. Pure: a figure in, text out.
"""

from collections.abc import Iterator, Sequence
from html import escape
from math import ceil, floor, isnan, log10
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from dinfer.views.figures.style import EITHER

WIDTH = 900

MARGIN = {"l": 60, "r": 20, "t": 50, "b": 45}

TEXT, GRID, _ = EITHER

LETTER = 6.2
"""approximate width of a letter, in pixels"""

LINE = 18
"""height of a line of the legend, in pixels"""

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


def svg(figure: go.Figure) -> str:
    """The figure as SVG on the page's background. It has the height of its layout, plus further lines of its legend."""
    given = figure.layout.margin
    margin = {name: most if given[name] is None else given[name] for name, most in MARGIN.items()}
    longest = max((len(str(label)) for label in _labels_at_left(figure)), default=0)
    left = max(margin["l"], longest * LETTER + 34)
    legend, lines = _legend(figure, left)
    height = int(figure.layout.height or 450) + LINE * lines
    scale = (
        70 if any(trace.type == "heatmap" and trace.showscale is not False for trace in figure.data) else 0
    )
    area = PlotArea(left, WIDTH - margin["r"] - scale, margin["t"] + LINE * lines, height - margin["b"])
    axes = {}
    for name in dict.fromkeys(name for trace in figure.data for name in _axes_of(trace)):
        begin, end = layout_of(figure, name).domain or (0, 1)
        place = area.across if name[0] == "x" else area.down
        axes[name] = _axis(figure, name, place(begin), place(end))
    back = "".join(_drawn_axes(figure, area, axes))
    drawn = "".join(_marks(trace, axes, figure) for trace in figure.data)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="{TEXT}">'
        f"{back}{drawn}{legend}{''.join(_annotations(figure, area))}</svg>"
    )


# -- axes


def layout_of(figure: go.Figure, name: str) -> Any:
    """The layout of an axis, such as "x" or "y2"."""
    return figure.layout[f"{name[0]}axis{name[1:]}"]


def _axes_of(trace: Any) -> tuple[str, str]:
    return trace.xaxis or "x", trace.yaxis or "y"


def _labels_at_left(figure: go.Figure) -> Iterator[Any]:
    """The labels of vertical axes, except plain numbers."""
    for name in {_axes_of(trace)[1] for trace in figure.data}:
        yield from layout_of(figure, name).ticktext or ()
    if figure.layout.yaxis.type == "category":
        yield from (name for trace in figure.data[:1] for name in trace.y)


def _axis(figure: go.Figure, name: str, begin: float, end: float) -> Axis:
    """The axis of that name between two pixels. It covers what is drawn on it and on the axes that match it."""
    layout, letter = layout_of(figure, name), name[0]
    own = [(_axes_of(trace)["xy".index(letter)], trace[letter]) for trace in figure.data]
    group = {name, layout.matches or name}
    group |= {one for one, _ in own if layout_of(figure, one).matches in group}
    values = [value for one, some in own if one in group and some is not None for value in some]
    categories = tuple(dict.fromkeys(map(str, values))) if layout.type == "category" else ()
    if layout.range is not None:
        low, high = map(float, layout.range)
    elif layout.type == "category":
        low, high = -0.5, max(1, len(categories)) - 0.5
    else:
        numbers = np.array([value for value in values if value is not None], np.float64)
        numbers = numbers[np.isfinite(numbers)]
        low, high = (min(0.0, float(numbers.min())), float(numbers.max())) if len(numbers) else (0.0, 1.0)
        high += 0.03 * (high - low) * bool(len(numbers))
    if layout.autorange == "reversed":
        low, high = high, low
    return Axis(low, high if high != low else low + 1, begin, end, layout.type == "log", categories)


def _ticks(layout: Any, axis: Axis) -> list[tuple[float, str]]:
    """The ticks of an axis: their positions in pixels, and labels."""
    if layout.type == "category":
        return [(axis.at(category), category) for category in axis.categories]
    if layout.tickvals is not None:
        first, last = sorted((axis.begin, axis.end))
        named = [
            (axis.at(value), str(text)) for value, text in zip(layout.tickvals, layout.ticktext, strict=True)
        ]
        return [(pixel, text) for pixel, text in named if first - 1 <= pixel <= last + 1]
    low, high = sorted((axis.low, axis.high))
    rough = (high - low) / 6  # so that there are about six
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    numbers = range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)
    return [(axis.at(n * step), f"{n * step:.6g}{layout.ticksuffix or ''}") for n in numbers]


def _drawn_axes(figure: go.Figure, area: PlotArea, axes: dict[str, Axis]) -> Iterator[str]:
    """Grid, labels and title of each axis."""
    for name, axis in axes.items():
        layout, is_x = layout_of(figure, name), name[0] == "x"
        other = axes.get(layout.anchor or "") or axes["y" if is_x else "x"]
        ticks = _ticks(layout, axis)
        if layout.showgrid is not False:
            low, high = sorted((other.begin, other.end))
            lines = [
                f"M{p:.1f} {low:.1f}V{high:.1f}" if is_x else f"M{low:.1f} {p:.1f}H{high:.1f}"
                for p, _ in ticks
            ]
            yield f'<path class="grid" d="{"".join(lines)}" stroke="{GRID}"/>'
        if layout.showticklabels is False:
            continue
        size, before = int(layout.tickfont.size or 12), None
        for pixel, text in ticks:
            room = LETTER * (len(text) + 1) if is_x else 8
            if before is not None and abs(pixel - before) < room:
                continue  # it would overlap the one before
            before = pixel
            if is_x:
                yield _text(pixel, other.begin + 15, text, "middle", size)
            else:
                yield _text(other.begin - 6, pixel + 0.35 * size, text, "end", size)
        middle = (axis.begin + axis.end) / 2
        if layout.title.text and is_x:
            yield _text(middle, other.begin + 33, layout.title.text, "middle")
        elif layout.title.text:
            yield _turned(min(other.begin, area.left) - 44, middle, -90, layout.title.text)


# -- what is drawn on them


def _marks(trace: Any, axes: dict[str, Axis], figure: go.Figure) -> str:
    x, y = (axes[name] for name in _axes_of(trace))
    if trace.type == "heatmap":
        return "".join(_heatmap(trace, x, y))
    if trace.type == "bar":
        return "".join(_bars(trace, x, y, figure))
    places = [(x.at(one), y.at(other)) for one, other in zip(trace.x, trace.y, strict=True)]
    return _line(trace, places) if trace.mode == "lines" else _points(trace, places)


def _points(trace: Any, places: Sequence[tuple[float, float]]) -> str:
    """The trace's symbol at each of these places."""
    if trace.marker.symbol in SHAPES:
        path = "".join(f"M{x:.1f} {y:.1f}{SHAPES[trace.marker.symbol]}" for x, y in places)
        return f'<path d="{path}" fill="{trace.marker.color}"/>'
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
    return f'<path d="{path}" stroke="{trace.marker.color}" stroke-width="5" stroke-linecap="round"/>'


def _line(trace: Any, places: Sequence[tuple[float, float]]) -> str:
    """A line with gaps at NaN; in steps if its shape says so."""
    path, is_on = "", False
    for x, y in places:
        if isnan(x) or isnan(y):
            is_on = False
            continue
        if not is_on:
            path += f"M{x:.1f} {y:.1f}"
        else:
            path += f"H{x:.1f}V{y:.1f}" if trace.line.shape == "hv" else f"L{x:.1f} {y:.1f}"
        is_on = True
    return (
        f'<path d="{path}" fill="none" stroke="{trace.line.color}" stroke-width="{trace.line.width or 2:g}"/>'
    )


def _bars(trace: Any, x: Axis, y: Axis, figure: go.Figure) -> Iterator[str]:
    """Horizontal bars, stacked on those of the traces before."""
    before = figure.data[: list(figure.data).index(trace)]
    high, fill, colour = y.step * BAR, _fill(trace), trace.marker.color
    if fill != colour:
        yield (
            f'<pattern id="{fill[5:-1]}" width="8" height="8" patternUnits="userSpaceOnUse">'
            f'<path d="M0 0h8v8h-8z" fill="{colour}"/>'
            f'<path d="M-2 2l4-4M0 8l8-8M6 10l4-4" stroke="{trace.marker.pattern.fgcolor}" stroke-width="2"/></pattern>'
        )
    for n, (name, long) in enumerate(zip(trace.y, trace.x, strict=True)):
        begin = sum(float(other.x[n]) for other in before)
        left, right, middle = x.at(begin), x.at(begin + long), y.at(name)
        box = f'x="{left:.1f}" y="{middle - high / 2:.1f}" width="{right - left:.1f}" height="{high:.1f}"'
        yield f'<rect class="bar" {box} fill="{fill}"><title>{escape(trace.name)}</title></rect>'
        if trace.text[n]:
            around = "" if fill == colour else colour
            yield _text((left + right) / 2, middle + 4, trace.text[n], "middle", 12, _on(colour), around)


def _fill(trace: Any) -> str:
    """The fill of a bar: its colour or stripes."""
    name = "".join(letter if letter.isalnum() else "-" for letter in trace.name)
    return f"url(#dinfer-{name})" if trace.marker.pattern.shape else trace.marker.color


def _heatmap(trace: Any, x: Axis, y: Axis) -> Iterator[str]:
    values = [value for row in trace.z for value in row if value is not None]
    if not values:
        return
    low, high = min(values), max(values)
    gap = trace.xgap or 0
    wide, tall = x.step - gap, y.step - gap
    cells = [
        (name, *cell)
        for name, row, texts in zip(trace.y, trace.z, trace.text, strict=True)
        for cell in zip(trace.x, row, texts, strict=True)
        if cell[1] is not None
    ]
    for name, column, value, text in cells:
        colour = _of_scale(trace, (value - low) / (high - low) if high > low else 0.5)
        across, down = x.at(column), y.at(name)
        box = f'x="{across - wide / 2:.1f}" y="{down - tall / 2:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
        yield f'<rect class="cell" {box} fill="{colour}"><title>{escape(text)}</title></rect>'
        size = int(min(12, (wide - 2) / max(1, 0.55 * len(text))))
        if trace.texttemplate and size >= 6:
            yield _text(across, down + 4, text, "middle", size, _on(colour))
    if trace.showscale is False:
        return
    # The colour bar, from the smallest value at the bottom to the largest.
    left, top, tall = x.end + 16, min(y.begin, y.end), abs(y.end - y.begin)
    for n in range(32):
        box = f'y="{top + (1 - (n + 1) / 32) * tall:.1f}" height="{tall / 32 + 0.5:.1f}"'
        yield f'<rect x="{left:.1f}" width="12" {box} fill="{_of_scale(trace, n / 32)}"/>'
    yield _text(left + 16, top + 10, f"{high:.3g}")
    yield _text(left + 16, top + tall, f"{low:.3g}")
    yield _text(left + 16, top + tall / 2, trace.colorbar.title.text or "")


def _of_scale(trace: Any, part: float) -> str:
    return str(sample_colorscale(list(map(list, trace.colorscale)), [part])[0])


def _on(colour: str) -> str:
    """Black or white, whichever contrasts more with that colour."""
    if colour.startswith("#"):
        red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    else:
        red, green, blue = (int(float(part)) for part in colour[4:-1].split(","))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


# -- words


def _legend(figure: go.Figure, left: float) -> tuple[str, int]:
    """The legend, each name once, and the number of its lines after the first."""
    named = {trace.name: trace for trace in figure.data if trace.name and trace.showlegend is not False}
    if len(named) < 2 or any(trace.type == "heatmap" for trace in figure.data):
        return "", 0
    drawn, x, line, order = "", left, 0, list(named.values())
    for trace in reversed(order) if figure.layout.legend.traceorder == "reversed" else order:
        wide = 34 + LETTER * len(trace.name)
        if x + wide > WIDTH and x > left:
            x, line = left, line + 1
        y = 14.5 + LINE * line
        if trace.type == "bar":
            drawn += f'<path d="M{x:.0f} {y - 5.5}h11v11h-11z" fill="{_fill(trace)}"/>'
        elif trace.mode == "lines":
            thick = min(9, trace.line.width or 2)
            drawn += f'<path d="M{x:.0f} {y}h11" stroke="{trace.line.color}" stroke-width="{thick:g}"/>'
        else:
            drawn += _points(trace, [(x + 5, y)])
        drawn += _text(x + 16, y + 4.5, trace.name)
        x += wide
    return drawn, line


def _annotations(figure: go.Figure, area: PlotArea) -> Iterator[str]:
    """The titles of rows and columns."""
    for one in figure.layout.annotations:
        x, y = area.across(one.x), area.down(one.y)
        yield (
            _turned(x + 6, y, one.textangle, one.text)
            if one.textangle
            else _text(x, y - 7, one.text, "middle")
        )


def _text(
    x: float, y: float, text: str, anchor: str = "start", size: int = 12, colour: str = "", around: str = ""
) -> str:
    about = f' text-anchor="{anchor}"' * (anchor != "start") + f' font-size="{size}"' * (size != 12)
    about += f' fill="{colour}"' * bool(colour)
    about += f' stroke="{around}" stroke-width="4" paint-order="stroke"' * bool(around)
    return f'<text x="{x:.1f}" y="{y:.1f}"{about}>{escape(text)}</text>'


def _turned(x: float, y: float, angle: float, text: str) -> str:
    place = f'transform="translate({x:.1f} {y:.1f}) rotate({angle:g})"'
    return f'<text {place} text-anchor="middle">{escape(text)}</text>'

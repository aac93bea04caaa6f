"""Picture: a plotly figure as SVG without script, for pages where nothing draws plotly's data: nbconvert, GitHub.

It draws what dinfer's figures are made of: points, lines, stacked bars and heatmaps, on linear, logarithmic and
category axes. Pure: a figure in, text out.
"""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from dinfer.views.figures.axes import Axis, Tick, axis_of, layout_of, ticks_of

WIDTH = 900
MARGIN = {"l": 60, "r": 20, "t": 50, "b": 45}
TEXT, GRID, BACK = "#212121", "#e3e6ea", "#ffffff"
LETTER = 6.2
"""the pixels of a letter, about"""
SMALLEST = 6
"""letters that are still drawn"""
LINE = 18
"""of the legend"""
BAR = 0.8
"""of the place of a category"""
SHAPES = {
    "square": "m-2.5-2.5h5v5h-5z",
    "diamond": "m-3.2 0l3.2-3.2 3.2 3.2-3.2 3.2z",
    "triangle-up": "m-3 2.4l3-5.2 3 5.2z",
    "triangle-down": "m-3-2.4l3 5.2 3-5.2z",
    "cross": "m-3-1h2v-2h2v2h2v2h-2v2h-2v-2h-2z",
    "x": "m-3-2l1-1 2 2 2-2 1 1-2 2 2 2-1 1-2-2-2 2-1-1 2-2z",
    "star": "m0-3.5l1 2.5h2.6l-2 1.6.8 2.6-2.4-1.6-2.4 1.6.8-2.6-2-1.6h2.6z",
}
"""paths from a point's middle; a circle is a line without length and with round ends"""


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
    """The figure, light, as high as its layout says, or higher where its legend takes more than a line."""
    left = _left(figure)
    legend = list(_legend(figure, left, width))
    more = LINE * max((entry.line for entry in legend), default=0)
    height = int(figure.layout.height or 450) + more
    frame = _frame(figure, left, more, width, height)
    axes = _axes(figure, frame)
    back = "".join(_drawn_axes(figure, frame, axes))
    marks = "".join(_trace(trace, *_own(trace, axes), figure) for trace in figure.data)
    words = "".join((*map(_entry, legend), *_annotations(figure, frame)))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="{TEXT}">'
        f'<rect width="{width}" height="{height}" fill="{BACK}"/>{back}{marks}{words}</svg>'
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
            yield _text(pixel, edge + 15, text, "middle", size)
        else:
            yield _text(edge - 6, pixel + 0.35 * size, text, "end", size)


def _title(name: str, text: str, axis: Axis, other: Axis, frame: Frame) -> str:
    middle = (axis.begin + axis.end) / 2
    if name[0] == "x":
        return _text(middle, other.begin + 33, text, "middle")
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
        mark = f'<path d="M{x:.0f} {y - 5.5}h11v11h-11z" fill="{_fill(trace)}"/>'
    elif trace.mode == "lines":
        wide = min(9, trace.line.width or 2)
        mark = f'<path d="M{x:.0f} {y}h11" stroke="{trace.line.color}" stroke-width="{wide:g}"/>'
    else:
        mark = _points(trace.marker.symbol, trace.marker.color, [(x + 5, y)])
    return mark + _text(x + 16, y + 4.5, trace.name)


def _annotations(figure: go.Figure, frame: Frame) -> Iterator[str]:
    """The titles of rows and columns."""
    for one in figure.layout.annotations:
        x, y = frame.across(one.x), frame.down(one.y)
        if one.textangle:
            yield _turned(x + 6, y, one.textangle, one.text)
        else:
            yield _text(x, y - 7, one.text, "middle")


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


# -- the plots


def _trace(trace: Any, x: Axis, y: Axis, figure: go.Figure) -> str:
    if trace.type == "heatmap":
        return "".join(_heatmap(trace, x, y))
    if trace.type == "bar":
        return "".join(_bars(trace, x, y, figure))
    if trace.mode == "lines":
        return _line(trace, x, y)
    points = [(x.at(one), y.at(other)) for one, other in zip(trace.x, trace.y, strict=True)]
    return _points(trace.marker.symbol, trace.marker.color, points)


def _points(symbol: str, colour: str, points: Sequence[tuple[float, float]]) -> str:
    if symbol in SHAPES:
        path = "".join(f"M{x:.1f} {y:.1f}{SHAPES[symbol]}" for x, y in points)
        return f'<path d="{path}" fill="{colour}"/>'
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
    return f'<path d="{path}" stroke="{colour}" stroke-width="5" stroke-linecap="round"/>'


def _line(trace: Any, x: Axis, y: Axis) -> str:
    """With a gap where a value is none, and in steps where the figure says so."""
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
    """Lying ones, each behind those of the traces before it."""
    before = figure.data[: list(figure.data).index(trace)]
    high, fill = y.step * BAR, _fill(trace)
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
            yield _text((left + right) / 2, middle + 4, trace.text[n], "middle", colour=on, around=around)


def _fill(trace: Any) -> str:
    """Its colour, or its stripes."""
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
                yield _text(across, down + 4, text, "middle", size, _on(colour))
    if trace.showscale is not False:
        yield from _scale(trace, x, y, low, high)


def _scale(trace: Any, x: Axis, y: Axis, low: float, high: float) -> Iterator[str]:
    """From the smallest value, below, to the largest."""
    left, top, tall = x.end + 16, min(y.begin, y.end), abs(y.end - y.begin)
    parts = [n / 32 for n in range(33)]
    for one, next_one in pairwise(parts):
        box = f'y="{top + (1 - next_one) * tall:.1f}" height="{tall / 32 + 0.5:.1f}"'
        yield f'<rect x="{left:.1f}" width="12" {box} fill="{_of_scale(trace, one)}"/>'
    yield _text(left + 16, top + 10, f"{high:.3g}")
    yield _text(left + 16, top + tall, f"{low:.3g}")
    yield _text(left + 16, top + tall / 2, trace.colorbar.title.text or "")


def _of_scale(trace: Any, part: float) -> str:
    return str(sample_colorscale(list(map(list, trace.colorscale)), [part])[0])


def _on(colour: str) -> str:
    """Black or white, whichever is read better on that colour."""
    if colour.startswith("#"):
        red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    else:
        red, green, blue = (int(float(part)) for part in colour[4:-1].split(","))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"

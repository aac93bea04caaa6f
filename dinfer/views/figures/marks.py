"""Marks: what the traces of a plotly figure are drawn as in SVG: points, lines, lying bars, heatmaps. Pure."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from dinfer.views.figures.axes import Axis

SMALLEST = 6
"""letters that are still drawn"""
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


def text_at(
    x: float, y: float, text: str, anchor: str = "start", size: int = 12, colour: str = "", around: str = ""
) -> str:
    about = f' text-anchor="{anchor}"' * (anchor != "start") + f' font-size="{size}"' * (size != 12)
    about += f' fill="{colour}"' * bool(colour)
    about += f' stroke="{around}" stroke-width="4" paint-order="stroke"' * bool(around)
    return f'<text x="{x:.1f}" y="{y:.1f}"{about}>{escape(text)}</text>'


def marks(trace: Any, x: Axis, y: Axis, figure: go.Figure) -> str:
    """All of one trace of the figure, between its axes."""
    if trace.type == "heatmap":
        return "".join(_heatmap(trace, x, y))
    if trace.type == "bar":
        return "".join(_bars(trace, x, y, figure))
    if trace.mode == "lines":
        return _line(trace, x, y)
    places = [(x.at(one), y.at(other)) for one, other in zip(trace.x, trace.y, strict=True)]
    return points(trace.marker.symbol, trace.marker.color, places)


def points(symbol: str, colour: str, places: Sequence[tuple[float, float]]) -> str:
    """One of plotly's symbols at each of these places."""
    if symbol in SHAPES:
        path = "".join(f"M{x:.1f} {y:.1f}{SHAPES[symbol]}" for x, y in places)
        return f'<path d="{path}" fill="{colour}"/>'
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
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
                yield text_at(across, down + 4, text, "middle", size, _on(colour))
    if trace.showscale is not False:
        yield from _scale(trace, x, y, low, high)


def _scale(trace: Any, x: Axis, y: Axis, low: float, high: float) -> Iterator[str]:
    """From the smallest value, below, to the largest."""
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
    """Black or white, whichever is read better on that colour."""
    if colour.startswith("#"):
        red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    else:
        red, green, blue = (int(float(part)) for part in colour[4:-1].split(","))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"

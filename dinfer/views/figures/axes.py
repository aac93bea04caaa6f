"""Axes: from the values of a plotly figure to pixels, as its layout says: of the kinds that dinfer's figures have."""

from collections.abc import Iterable, Sequence
from math import ceil, floor, log10
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

MOST_TICKS = 6
Tick = tuple[float, str]
"""where, in pixels, and what it says"""


class Axis(NamedTuple):
    """`low` lies at the pixel `begin`, `high` at `end`; of a logarithmic axis, these are powers of ten, of one of
    categories their numbers."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool
    categories: tuple[str, ...]

    def at(self, value: Any) -> float:
        """The pixel of a value. Not a number where that is none."""
        if self.categories:
            value = self.categories.index(str(value))
        elif self.is_log:
            value = log10(value) if value > 0 else self.low
        return self.begin + (float(value) - self.low) / (self.high - self.low) * (self.end - self.begin)

    @property
    def step(self) -> float:
        """The pixels of one category."""
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
    """What is written along it."""
    layout = layout_of(figure, name)
    if layout.type == "category":
        return [(axis.at(category), category) for category in axis.categories]
    if layout.tickvals is not None:
        named = zip(layout.tickvals, layout.ticktext, strict=True)
        return [(axis.at(value), str(text)) for value, text in named if _is_within(axis, value)]
    return [(axis.at(value), f"{value:.6g}{layout.ticksuffix or ''}") for value in _round_values(axis)]


def layout_of(figure: go.Figure, name: str) -> Any:
    """The part of the layout that says what an axis is."""
    return figure.layout[f"{name[0]}axis{name[1:]}"]


def _values(figure: go.Figure, name: str) -> Sequence[Any]:
    """All that lies on the axis, and on those that are to be like it."""
    group = {name, layout_of(figure, name).matches or name}
    group |= {one for one in _names(figure, name[0]) if layout_of(figure, one).matches in group}
    found = [getattr(trace, name[0]) for trace in figure.data if _axis_name(trace, name[0]) in group]
    return [value for some in found if some is not None for value in some]


def _names(figure: go.Figure, letter: str) -> Iterable[str]:
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
    """Few enough, a round number apart."""
    low, high = sorted((axis.low, axis.high))
    rough = (high - low) / MOST_TICKS
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [number * step for number in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]

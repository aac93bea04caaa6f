"""Plots: the figures of results by name, as `run.trace.lanes()` and `session.sweep(…).plot()` ask for them."""

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go

from dinfer.views.figures.exposure import exposure
from dinfer.views.figures.gantt import gantt
from dinfer.views.figures.latency import distribution, latency, layers
from dinfer.views.figures.matrix import matrix
from dinfer.views.figures.shown import Shown
from dinfer.views.figures.sweep import sweep

PLOTS: dict[str, Callable[[Any], go.Figure]] = {
    "exposure": exposure,
    "gantt": gantt,
    "latency": latency,
    "distribution": distribution,
    "matrix": matrix,
    "layers": layers,
    "sweep": sweep,
}


def plot(name: str, result: Any) -> Shown:
    """The figure of that name of a result, for a cell to show."""
    return Shown(PLOTS[name](result))

"""Matrix: transfers between every two ranks, as coloured numbers."""

from collections.abc import Callable, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dinfer.trace.intervals import length, union
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import Transfer, by_link, spread, transfers
from dinfer.views.figures.style import SCALE, styled


def _bandwidth(found: Sequence[Transfer]) -> float | None:
    """MB/s while at least one message was on the wire; None if that took no time."""
    wire = length(union((one.met, one.end) for one in found))
    return sum(one.bytes for one in found) * 1e3 / wire if wire else None


MEASURES: dict[str, Callable[[Sequence[Transfer]], float | None]] = {
    "MB": lambda found: sum(one.bytes for one in found) / 1e6,
    "MB/s on wire": _bandwidth,
    "median, ms": lambda found: spread(one.latency for one in found).p50 * 1e3,
    "p99, ms": lambda found: spread(one.latency for one in found).p99 * 1e3,
}

IN_ONE_ROW = 4
"""ranks of the largest matrices that stand in one row; those of more ranks stand two by two"""

NUMBERED = 16
"""ranks of the largest matrices whose cells have room for numbers; others show them when the mouse is over a cell"""


def matrix(trace: Trace, *, dark: bool = False) -> go.Figure:
    """Rank × rank: megabytes, megabytes per second on the wire, and latency's median and 99th percentile. Where cells
    have no room for numbers, titles say which values the colours range over."""
    links = by_link(transfers(trace))
    ranks = sorted({*trace.ranks, *(rank for link in links for rank in link)})
    names = list(map(str, ranks))
    measured = {
        name: [
            [measure(links[source, target]) if (source, target) in links else None for target in ranks]
            for source in ranks
        ]
        for name, measure in MEASURES.items()
    }
    has_numbers = len(ranks) <= NUMBERED
    columns = len(MEASURES) if len(ranks) <= IN_ONE_ROW else 2
    rows = len(MEASURES) // columns
    titles = [name if has_numbers else f"{name}{_range_text(values)}" for name, values in measured.items()]
    per_rank = 34 if has_numbers else max(6, 540 // len(ranks))
    high = per_rank * max(4, len(ranks))
    height = 110 + (high + 40) * rows
    figure = make_subplots(
        rows,
        columns,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=40 / height,
        subplot_titles=titles,
    )
    for number, (name, values) in enumerate(measured.items()):
        heat = go.Heatmap(
            x=names,
            y=names,
            z=values,
            text=[["" if value is None else short(value) for value in row] for row in values],
            texttemplate="%{text}" if has_numbers else None,
            textfont={"size": 10 if len(ranks) <= 8 else 9},
            hovertemplate=f"rank %{{y}} to rank %{{x}}: %{{text}} {name}<extra></extra>",
            hoverongaps=False,
            colorscale=SCALE,
            showscale=False,
            xgap=2 if has_numbers else 1,
            ygap=2 if has_numbers else 1,
        )
        figure.add_trace(heat, 1 + number // columns, 1 + number % columns)
    figure.update_xaxes(showgrid=False, type="category")
    figure.update_xaxes(title={"text": "to rank"}, row=rows)
    figure.update_yaxes(showgrid=False, autorange="reversed", type="category")
    figure.update_yaxes(title={"text": "from rank"}, col=1)
    return styled(figure, dark=dark, height=height)


def _range_text(values: Sequence[Sequence[float | None]]) -> str:
    """For example `: 0.5 (dark) to 12.3 (yellow)`."""
    known = [value for row in values for value in row if value is not None]
    return f": {short(min(known))} (dark) to {short(max(known))} (yellow)" if known else ""


def short(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1g}"

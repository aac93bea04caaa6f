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
    "MB/s on the wire": _bandwidth,
    "ms, median latency": lambda found: spread(one.latency for one in found).p50 * 1e3,
    "ms, 99th percentile": lambda found: spread(one.latency for one in found).p99 * 1e3,
}


def matrix(trace: Trace, *, dark: bool = False) -> go.Figure:
    """Rank × rank: megabytes, megabytes per second on the wire, and latency's median and 99th percentile."""
    links = by_link(transfers(trace))
    ranks = sorted({*trace.ranks, *(rank for link in links for rank in link)})
    names = [str(rank) for rank in ranks]
    figure = make_subplots(
        1, len(MEASURES), shared_yaxes=True, horizontal_spacing=0.03, column_titles=list(MEASURES)
    )
    for column, (name, measure) in enumerate(MEASURES.items(), 1):
        values = [
            [measure(links[source, target]) if (source, target) in links else None for target in ranks]
            for source in ranks
        ]
        heat = go.Heatmap(
            x=names,
            y=names,
            z=values,
            text=[["" if value is None else short(value) for value in row] for row in values],
            texttemplate="%{text}",
            hovertemplate=f"rank %{{y}} to rank %{{x}}: %{{text}} {name}<extra></extra>",
            hoverongaps=False,
            colorscale=SCALE,
            showscale=False,
            xgap=2,
            ygap=2,
        )
        figure.add_trace(heat, 1, column)
    figure.update_xaxes(title={"text": "to rank"}, showgrid=False, type="category")
    figure.update_yaxes(showgrid=False, autorange="reversed", type="category")
    figure.update_yaxes(title={"text": "from rank"}, row=1, col=1)
    return styled(figure, dark=dark, height=150 + 34 * max(4, len(ranks)))


def short(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1g}"

"""Sweep: how long prefill took in each run of a sweep, and what that time went into."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from dinfer.views.figures.style import BUBBLE, COMPUTE, WAIT, WIRE, styled

BARS = {
    "compute": ("compute", COMPUTE),
    "exposed_wire": ("exposed: on the wire", WIRE),
    "exposed_wait": ("exposed: waiting", WAIT),
    "bubble": ("bubble", BUBBLE),
}
"""names and colours by part, as `dinfer.trace.shares.Shares.parts` has them"""

SweptRun = tuple[str, float, Mapping[str, float]]
"""name, seconds of prefill, and its parts, which add up to 1"""


def sweep(runs: Sequence[SweptRun], *, dark: bool = False) -> go.Figure:
    """A bar per run, as long as its prefill took, divided by what the time of all its ranks went into."""
    figure = go.Figure()
    for part, (name, colour) in BARS.items():
        percent = [100 * parts[part] for _, _, parts in runs]
        figure.add_bar(
            name=name,
            orientation="h",
            y=[run for run, _, _ in runs],
            x=[seconds * parts[part] for _, seconds, parts in runs],
            text=[f"{share:.0f} %" if share >= 8 else "" for share in percent],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            constraintext="none",
            customdata=[[run, share] for (run, _, _), share in zip(runs, percent, strict=True)],
            hovertemplate=f"%{{customdata[0]}}: {name}, %{{customdata[1]:.1f}} % of all ranks' time<extra></extra>",
            marker={"color": colour, "pattern": {"shape": ""}},
        )
    longest = max((seconds for _, seconds, _ in runs), default=1.0)
    figure.update_xaxes(title={"text": "seconds of prefill"}, range=[0, 1.03 * longest])
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    height = 130 + 30 * max(2, len(runs))
    return styled(figure, dark=dark, height=height, barmode="stack", legend_traceorder="normal")

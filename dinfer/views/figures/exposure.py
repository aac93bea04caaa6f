"""Exposure: how each rank spent its prefill, and how much of its communication was not hidden by compute."""

from collections.abc import Callable

import plotly.graph_objects as go

from dinfer.trace.intervals import length
from dinfer.trace.shares import Share, shares
from dinfer.trace.trace import Trace
from dinfer.views.figures.style import BUBBLE, COMPUTE, OWN_CODE, WAIT, WIRE, styled

STRIPES = {"fgcolor": WIRE, "fgopacity": 1, "solidity": 0.25, "size": 9}

PARTS: tuple[tuple[str, Callable[[Share], int], str, str], ...] = (
    ("compute", lambda share: length(share.compute) - length(share.hidden), COMPUTE, ""),
    ("compute hiding transfers", lambda share: length(share.hidden), COMPUTE, "/"),
    ("exposed: on the wire", lambda share: length(share.wire), WIRE, ""),
    ("exposed: waiting", lambda share: length(share.wait), WAIT, ""),
    ("bubble", lambda share: length(share.bubble), BUBBLE, ""),
)
"""names, nanoseconds, colours and patterns"""


def exposure(trace: Trace, *, dark: bool = False) -> go.Figure:
    """A bar per rank, divided into parts of its prefill."""
    found = shares(trace).ranks
    figure = go.Figure()
    for part, take, colour, pattern in PARTS:
        name = part.replace("compute", OWN_CODE) if trace.is_watched else part
        seconds = [take(share) / 1e9 for share in found]
        percent = [100 * one / share.prefill_s for one, share in zip(seconds, found, strict=True)]
        figure.add_bar(
            name=name,
            orientation="h",
            y=[f"rank {share.rank}" for share in found],
            x=percent,
            text=[f"{one:.0f} %" if one >= 4 else "" for one in percent],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            customdata=seconds,
            hovertemplate=f"%{{y}}: {name}, %{{x:.1f}} % (%{{customdata:.3f}} s)<extra></extra>",
            marker={"color": colour, "pattern": {"shape": pattern, "fillmode": "overlay", **STRIPES}},
        )
    figure.update_xaxes(
        title={"text": "part of the rank's time" if trace.is_watched else "part of the rank's prefill"},
        ticksuffix=" %",
        range=[0, 100],
    )
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    height = 130 + max(12, min(30, 900 // max(1, len(found)))) * max(2, len(found))
    return styled(figure, dark=dark, height=height, barmode="stack", legend_traceorder="normal")

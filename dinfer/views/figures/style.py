"""Style: what all figures look like, in light and dark. Colours are Okabe and Ito's, told apart by the colour-blind.

Each colour stands out from white and from black, so that one figure serves both; only its template differs. A
third one is for where the page's theme is not known.
"""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from dinfer.trace.transfers import Link

COMPUTE, WIRE, WAIT, BUBBLE = "#0072B2", "#E69F00", "#CC79A7", "#999999"
"""what a rank does: computing, data on the wire, waiting for a peer, nothing to do"""

LINKS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

SCALE = "Cividis"

FONT = "system-ui, sans-serif"

LIGHT, DARK = ("#212121", "#e3e6ea", "#ffffff"), ("#e8e8e8", "#3a3f45", "#16181b")
"""text, grid and background"""

EITHER = ("#7a7a7a", "rgba(128, 128, 128, 0.3)", "rgba(0, 0, 0, 0)")
"""the same where the page may be light or dark, and change: its background shows, and the text is read on either"""


def styled(figure: go.Figure, *, dark: bool, height: int, **layout: Any) -> go.Figure:
    """The figure with dinfer's template, which has no title of its own: the page has it."""
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"}
    figure.layout.template = template(dark=dark)  # in place of plotly's own, not on top of it
    figure.update_layout(height=height, legend=legend)
    return figure.update_layout(**layout)


def template(*, dark: bool | None) -> dict[str, Any]:
    """plotly's word for all that a figure does not say itself; with None for `dark`, fit for light and dark pages."""
    text, grid, back = EITHER if dark is None else DARK if dark else LIGHT
    axis = {
        "gridcolor": grid,
        "linecolor": grid,
        "zerolinecolor": grid,
        "automargin": True,
        "ticks": "",
        "title": {"standoff": 6},
    }
    return {
        "layout": {
            "font": {"family": FONT, "size": 12, "color": text},
            "paper_bgcolor": back,
            "plot_bgcolor": back,
            "xaxis": axis,
            "yaxis": axis,
            "margin": {"l": 60, "r": 20, "t": 50, "b": 45},
            "hoverlabel": {"font": {"family": FONT, "size": 12}},
            "hovermode": "closest",
            "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": BUBBLE, "activecolor": text},
            "colorway": list(LINKS),
        }
    }


def link_name(link: Link) -> str:
    return f"{link[0]}→{link[1]}"


def link_line(links: Sequence[Link], link: Link) -> dict[str, Any]:
    """The same for lines: past six, the dashes tell apart."""
    number = list(links).index(link)
    return {"color": LINKS[number % len(LINKS)], "dash": DASHES[number // len(LINKS) % len(DASHES)]}


def link_marker(links: Sequence[Link], link: Link) -> dict[str, Any]:
    """A colour and a shape of its own for each link: past six, the shape tells apart what the colour does not."""
    number = list(links).index(link)
    return {
        "color": LINKS[number % len(LINKS)],
        "symbol": SYMBOLS[number // len(LINKS) % len(SYMBOLS)]
        if len(links) > len(LINKS)
        else SYMBOLS[number],
        "size": 5,
    }


HTML_CONFIG = {"showSendToCloud": False, "plotlyServerURL": "", "displaylogo": False}
"""no button that uploads the figure"""

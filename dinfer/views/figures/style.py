"""Style: the look of all figures, in light and dark. Colours are Okabe and Ito's, distinct for colour-blind readers.

Each colour contrasts with white and with black, so that a figure serves both; only its template differs. A third
template is for pages whose theme is unknown.
"""

from typing import Any

import plotly.graph_objects as go

from dinfer.trace.transfers import LinkRanks

COMPUTE, WIRE, WAIT, BUBBLE = "#0072B2", "#E69F00", "#CC79A7", "#999999"
"""what a rank does: computing, data on the wire, waiting for a peer, nothing to do"""

OWN_CODE = "its own code"
"""what stands for computing in the trace of a watched program: all that is no op of torch.distributed"""

LINKS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

SCALE = "Cividis"

FONT = "system-ui, sans-serif"

LIGHT, DARK = ("#212121", "#e3e6ea", "#ffffff"), ("#e8e8e8", "#3a3f45", "#16181b")
"""text, grid and background"""

EITHER = ("#7a7a7a", "rgba(128, 128, 128, 0.3)", "rgba(0, 0, 0, 0)")
"""the same for pages of unknown theme: a transparent background, and text legible on both"""


def styled(figure: go.Figure, *, dark: bool, height: int, **layout: Any) -> go.Figure:
    """The figure with dinfer's template. It has no title; the page has one."""
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"}
    figure.layout.template = template(dark=dark)  # replaces plotly's template, does not extend it
    figure.update_layout(height=height, legend=legend)
    return figure.update_layout(**layout)


def template(*, dark: bool | None) -> dict[str, Any]:
    """A plotly template: defaults of a figure. `dark`: None for pages of unknown theme."""
    text, grid, back = EITHER if dark is None else DARK if dark else LIGHT
    axis: dict[str, Any] = {"gridcolor": grid, "linecolor": grid, "zerolinecolor": grid}
    axis |= {"automargin": True, "ticks": "", "title": {"standoff": 6}}
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


def link_name(link: LinkRanks) -> str:
    return f"{link[0]}→{link[1]}"


def link_line(number: int) -> dict[str, Any]:
    """A colour and dash for a link, by its number: beyond six links, dashes differ. Grey for all others, −1."""
    if number < 0:
        return {"color": BUBBLE}
    return {"color": LINKS[number % len(LINKS)], "dash": DASHES[number // len(LINKS) % len(DASHES)]}


def link_marker(number: int, count: int) -> dict[str, Any]:
    """A colour and symbol for one of `count` links: of more than six, symbols differ where colours do not. Grey for all
    others, −1."""
    if number < 0:
        return {"color": BUBBLE, "symbol": "circle", "size": 4}
    symbol = SYMBOLS[number // len(LINKS) % len(SYMBOLS)] if count > len(LINKS) else SYMBOLS[number]
    return {"color": LINKS[number % len(LINKS)], "symbol": symbol, "size": 5}


def html_config() -> dict[str, Any]:
    """Plotly's config of a figure, without a button that uploads it; a new dict, since `to_html` changes its own."""
    return {"showSendToCloud": False, "plotlyServerURL": "", "displaylogo": False}

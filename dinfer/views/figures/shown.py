"""Shown: a figure in a notebook, as data that JupyterLab, Notebook 7 and VS Code draw, and as a still picture
elsewhere.

plotly's own display adds five megabytes of script to each cell, and a button that sends the data to a cloud. This one
takes a few kilobytes and has no such button. Front ends draw it whatever their theme, and save a picture of it, so
dinfer's light template is replaced by one that is legible on light and dark pages.
"""

import json
from typing import Any

import plotly.graph_objects as go

from dinfer.views.figures.style import HTML_CONFIG, template
from dinfer.views.figures.svg import svg

MIME = "application/vnd.plotly.v1+json"


class Shown:
    """The last expression of a cell: `Shown(latency(run.trace))`. `figure` is plotly's and can be changed."""

    def __init__(self, figure: go.Figure) -> None:
        self.figure = figure

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        data = {**json.loads(self.figure.to_json()), "config": HTML_CONFIG}
        if data["layout"].get("template") == template(dark=False):
            data["layout"]["template"] = template(dark=None)
        return {MIME: data, "image/svg+xml": svg(self.figure), "text/plain": repr(self)}

    def __repr__(self) -> str:
        drawn = len(self.figure.data)
        return f"a figure of {drawn} series; JupyterLab, Notebook 7 and VS Code draw it"

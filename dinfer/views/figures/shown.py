"""Shown: a figure under a cell of a notebook, as data that JupyterLab, Notebook 7 and VS Code draw themselves, and as a
still picture for where nothing does.

plotly's own way puts five megabytes of script under each cell, with a button that sends the data to a cloud. This is a
few kilobytes, and has no such button. Front ends draw it as it is, whatever their theme, and keep a picture of that: so
what has dinfer's own light look gets one that is read on light and dark pages alike.
"""

import json
from typing import Any

import plotly.graph_objects as go

from dinfer.views.figures.style import HTML_CONFIG, template
from dinfer.views.figures.svg import svg

MIME = "application/vnd.plotly.v1+json"


class Shown:
    """What a cell ends with: `Shown(latency(run.trace))`. `figure` is plotly's, for whoever wants to change it."""

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

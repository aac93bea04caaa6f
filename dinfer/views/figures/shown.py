"""Shown: a figure under a cell of a notebook, as data that JupyterLab, Notebook 7 and VS Code draw themselves.

plotly's own way puts five megabytes of script under each cell, with a button that sends the data to a cloud. This is a
few kilobytes, and has no such button. Where nothing draws it, its title is all that is left.
"""

import json
from typing import Any

import plotly.graph_objects as go

from dinfer.views.bench import HTML_CONFIG

MIME = "application/vnd.plotly.v1+json"


class Shown:
    """What a cell ends with: `Shown(latency(run.trace))`. `figure` is plotly's, for whoever wants to change it."""

    def __init__(self, figure: go.Figure) -> None:
        self.figure = figure

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {MIME: {**json.loads(self.figure.to_json()), "config": HTML_CONFIG}, "text/plain": repr(self)}

    def __repr__(self) -> str:
        drawn = len(self.figure.data)
        return f"a figure of {drawn} series; JupyterLab, Notebook 7 and VS Code draw it"

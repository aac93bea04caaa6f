"""Shown: a figure in a notebook, as data that JupyterLab, Notebook 7 and VS Code draw, and as a still picture
elsewhere.

plotly's own display adds five megabytes of script to each cell, and a button that sends the data to a cloud. This one
takes a few kilobytes and has no such button. Front ends draw it whatever their theme, and save a picture of it, so
dinfer's light template is replaced by one that is legible on light and dark pages.
"""

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from dinfer.display import Tidy, WrittenPath
from dinfer.errors import NotPossible
from dinfer.trace.export import write_whole
from dinfer.views.figures.style import HTML_CONFIG, template
from dinfer.views.figures.svg import svg

MIME = "application/vnd.plotly.v1+json"


class Shown(Tidy, called="plot"):
    """What `run.trace.latency()` and its like return: the last expression of a cell shows it. `figure` is plotly's and
    can be changed."""

    def __init__(self, figure: go.Figure) -> None:
        self.figure = figure

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        data = {**json.loads(self.figure.to_json()), "config": HTML_CONFIG}
        if data["layout"].get("template") == template(dark=False):
            data["layout"]["template"] = template(dark=None)
        return {MIME: data, "image/svg+xml": svg(self.figure), "text/plain": repr(self)}

    def save(self, path: str | Path) -> Path:
        """Write the figure to a file: a page of its own if the name ends in .html, a picture if it ends in .svg. Raises
        NotPossible for another name, OSError."""
        target = Path(path).expanduser()
        if target.suffix == ".html":
            text = self.figure.to_html(config=HTML_CONFIG)
        elif target.suffix == ".svg":
            text = svg(self.figure)
        else:
            raise NotPossible(
                f"a figure cannot be written to {str(path)!r}: the name must end in .html or .svg."
            )
        write_whole(target, [text])
        return WrittenPath(target)

    def __repr__(self) -> str:
        drawn = len(self.figure.data)
        return (
            f"a figure of {drawn} series; JupyterLab, Notebook 7 and VS Code draw it, "
            ".save('figure.html') writes it to a file"
        )

"""Shown: a figure in a notebook, as data that JupyterLab, Notebook 7 and VS Code draw, and as a still picture
elsewhere.

plotly's own display adds five megabytes of script to each cell, and a button that sends the data to a cloud. This one
takes a few kilobytes and has no such button. Front ends draw it whatever their theme, and save a picture of it, so
dinfer's light template is replaced by one that is legible on light and dark pages.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dinfer.display import Tidy
from dinfer.errors import NotPossible
from dinfer.files import WrittenPath
from dinfer.tabular import TableRow, Tabular
from dinfer.trace.export import write_whole
from dinfer.views.figures.style import html_config, template
from dinfer.views.figures.svg import svg

ARRAYS = ("x", "y", "z", "base", "width", "text", "values", "labels")
"""of a series, what has a value for each of its points"""

MIME = "application/vnd.plotly.v1+json"


class Shown(Tidy, Tabular, called="plot"):
    """What `run.trace.latency()` and its like return: the last expression of a cell shows it. `figure` is plotly's and
    can be changed."""

    def __init__(self, figure: go.Figure) -> None:
        self.figure = figure

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        data = {**json.loads(self.figure.to_json()), "config": html_config()}
        if data["layout"].get("template") == template(dark=False):
            data["layout"]["template"] = template(dark=None)
        return {MIME: data, "image/svg+xml": svg(self.figure), "text/plain": repr(self)}

    def save(self, path: str | Path) -> Path:
        """Write the figure to a file: a page of its own if the name ends in .html, a picture if it ends in .svg. Raises
        NotPossible for another name, OSError."""
        target = Path(path).expanduser()
        if target.suffix == ".html":
            text = self.figure.to_html(config=html_config())
        elif target.suffix == ".svg":
            text = svg(self.figure)
        else:
            raise NotPossible(
                f"a figure cannot be written to {str(path)!r}: the name must end in .html or .svg."
            )
        write_whole(target, [text])
        return WrittenPath(target)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        """A row for each point or bar: its series, and the values that it is drawn from."""
        found = [(line.name or f"series {n}", _arrays(line)) for n, line in enumerate(self.figure.data)]
        columns = list(dict.fromkeys(name for _, arrays in found for name in arrays))
        rows = (
            [name, *(arrays[column][n] if n < len(arrays.get(column, ())) else None for column in columns)]
            for name, arrays in found
            for n in range(max(map(len, arrays.values()), default=0))
        )
        return ["series", *columns], rows

    def __repr__(self) -> str:
        drawn = len(self.figure.data)
        return (
            f"a figure of {drawn} series; JupyterLab, Notebook 7 and VS Code draw it, "
            ".save('figure.html') writes it to a file"
        )


def _arrays(line: Any) -> Mapping[str, Sequence[Any]]:
    """What a series is drawn from, by name; of a map, a value for each of its cells."""
    found = {name: np.asarray(line[name]) for name in ARRAYS if name in line and line[name] is not None}
    if "z" in found and found["z"].ndim == 2:
        rows, columns = found["z"].shape
        x, y = found.pop("x", np.arange(columns)), found.pop("y", np.arange(rows))
        apart = {name: values for name, values in found.items() if values.shape[:2] == (rows, columns)}
        found = {"x": np.tile(x, rows), "y": np.repeat(y, columns)}
        found |= {name: values.reshape(rows * columns, *values.shape[2:]) for name, values in apart.items()}
    return {name: values.tolist() for name, values in found.items() if values.ndim}

"""Notebooks, executed, and what is shown under their cells. Not a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.support.kernels import COLOURS

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CELL_S = 120


class Page:
    """A notebook after its execution: what is shown under each cell that has a tag."""

    def __init__(self, notebook: Any) -> None:
        self.outputs = {tag: cell.outputs for cell in notebook.cells for tag in cell.metadata.get("tags", ())}

    def text(self, tag: str) -> str:
        """The text under a cell; of an error, what stands in place of a traceback."""
        return COLOURS.sub("", "\n".join(map(_text, self.outputs[tag])))

    def html(self, tag: str) -> str:
        """Its HTML, which is what a page made by nbconvert shows."""
        return "\n".join(output.get("data", {}).get("text/html", "") for output in self.outputs[tag])


def _text(output: Any) -> str:
    if output.output_type == "error":
        return "\n".join(output.traceback)
    is_stream = output.output_type == "stream"
    return str(output.text if is_stream else output.get("data", {}).get("text/plain", ""))


def read(path: Path) -> Any:
    """A notebook file, checked against the format."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    return notebook


def executed(notebook: Any, folder: Path | None = None) -> Page:
    """From its first cell to its last, in that folder; a cell that fails ends it, unless its tag says that it will."""
    about = {"metadata": {"path": str(folder)}} if folder else {}
    NotebookClient(notebook, timeout=CELL_S, kernel_name="python3", resources=about).execute()
    return Page(notebook)

"""A notebook with one output as the page that nbconvert makes of it. Not a test."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

from nbconvert import HTMLExporter
from nbformat import v4


def converted(data: dict[str, Any], metadata: dict[str, Any] | None = None) -> str:
    """The page of a cell that has left this bundle."""
    output = {"output_type": "display_data", "data": data, "metadata": metadata or {}}
    cell = v4.new_code_cell(id="a", execution_count=1, outputs=[output])  # type: ignore[no-untyped-call]
    text = json.dumps(v4.new_notebook(cells=[cell]))  # type: ignore[no-untyped-call]
    page: str = HTMLExporter().from_file(StringIO(text))[0]  # type: ignore[no-untyped-call]
    return page

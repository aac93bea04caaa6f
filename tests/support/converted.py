"""A notebook with one output as the page that nbconvert makes of it. Not a test."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

from nbconvert import HTMLExporter


def converted(data: dict[str, Any], metadata: dict[str, Any] | None = None) -> str:
    """The page of a cell that has left this bundle."""
    output = {"output_type": "display_data", "data": data, "metadata": metadata or {}}
    cell = {
        "cell_type": "code",
        "id": "a",
        "source": "",
        "metadata": {},
        "execution_count": 1,
        "outputs": [output],
    }
    text = json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]})
    page: str = HTMLExporter().from_file(StringIO(text))[0]  # type: ignore[no-untyped-call]
    return page

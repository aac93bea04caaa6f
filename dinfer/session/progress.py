"""Progress: bars that a notebook keeps as text.

tqdm's own bar in a notebook is a widget, in whose place Jupyter shows an error once the notebook is opened again.
"""

import io
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from dinfer.display import DisplayableText
from dinfer.errors import ipython


class TextBar(tqdm):  # type: ignore[type-arg]
    """A bar that is a line of text in the output of a cell."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:  # noqa: ARG004
        """Called by tqdm for a function that shows the bar's text."""
        from IPython.display import DisplayHandle

        handle: Any = DisplayHandle()  # type: ignore[no-untyped-call]
        shown = list[str]()

        def show(text: str) -> None:
            if text:  # tqdm clears a bar with ""
                (handle.update if shown else handle.display)(DisplayableText(text))
                shown[:] = [text]

        return show


def progress_bar(*args: Any, **options: Any) -> Any:
    """A bar of tqdm: in a notebook as text under the cell, elsewhere on standard error."""
    in_notebook = hasattr(ipython(), "kernel")
    made: Any = TextBar if in_notebook else tqdm
    return made(*args, **options, **({"file": io.StringIO(), "ascii": False} if in_notebook else {}))

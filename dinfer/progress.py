"""Progress: bars that a notebook keeps as text.

tqdm's own bar in a notebook is a widget, in whose place Jupyter shows an error once the notebook is opened again.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

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


class Reported(Protocol):
    """What a rank reports of a long command: how much of it is `done`, of `total`."""

    @property
    def done(self) -> int: ...

    @property
    def total(self) -> int: ...


@contextmanager
def rank_bars(
    shown: Sequence[int], reported: Callable[[int], Reported | None], what: str = "", **options: Any
) -> Iterator[Callable[[], None]]:
    """One bar for each of these ranks that reports something; the function updates them."""
    found: dict[int, Any] = {}

    def show() -> None:
        for rank in shown:
            if said := reported(rank):
                if rank not in found:
                    found[rank] = progress_bar(total=said.total, desc=f"rank {rank}{what}", **options)
                found[rank].update(said.done - found[rank].n)

    try:
        yield show
    finally:
        show()
        for bar in found.values():
            bar.close()

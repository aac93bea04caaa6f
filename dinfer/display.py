"""How results look in consoles and notebooks: texts, tables, HTML; and objects that a `with` statement closes."""

import os
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TextIO

from dinfer.arguments import check_calls
from dinfer.errors import NotPossible, ipython
from dinfer.severity import Severity
from dinfer.tabular import TableRow, Tabular


def devices_text(devices: Sequence[str]) -> str:
    """The devices of ranks, each once: `3 CPUs`; `cuda:0, cuda:1`; `cuda:0 (3 ranks)`."""
    counts = Counter(devices)
    cpus = counts.pop("cpu", 0)
    others = [device if count == 1 else f"{device} ({count} ranks)" for device, count in counts.items()]
    return ", ".join([f"{cpus} CPU{'s' * (cpus > 1)}"] * bool(cpus) + others)


class Closing(ABC):
    """An object that has to be closed; usable in a `with` statement."""

    @abstractmethod
    def close(self) -> None:
        """Release what it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def badge(severity: Severity) -> str:
    """Its icon and word as HTML, in colours that can be read on a light and on a dark page; "" for a note."""
    if severity == Severity.NOTE:
        return ""
    tint = severity.tint(dark=False)
    style = f"color:{tint.text};background:{tint.back};border-radius:3px;padding:0 5px;font-weight:600"
    return f'<span style="{style}">{severity.mark}</span> '


def html_text(text: str, severity: Severity = Severity.NOTE) -> str:
    """Text as HTML that keeps lines and spaces, after the badge of its severity. Long lines break between words; a
    notebook's own style would break inside `block c2 l1`."""
    style = "margin:0;white-space:pre-wrap;word-break:normal;overflow-wrap:break-word"
    return f'<pre style="{style}">{badge(severity)}{escape(text)}</pre>'


SHOWN = 3


def numbers_text(numbers: Sequence[int]) -> str:
    """For example `3 × 512, 256`; `none` for none."""
    runs = list[list[int]]()
    for number in numbers:
        if runs and runs[-1][0] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return ", ".join(f"{count} × {n}" if count > 1 else str(n) for n, count in runs) or "none"


def listed(sentences: Sequence[str]) -> str:
    """The first SHOWN sentences, and how many more there are."""
    more = [f"and {len(sentences) - SHOWN} more"] * (len(sentences) > SHOWN)
    return "; ".join([*sentences[:SHOWN], *more])


MOST = 5


def few(lines: Sequence[str]) -> list[str]:
    """The first MOST lines, or items, of many, and how many more there are."""
    return [*lines[:MOST], *[f"and {len(lines) - MOST} more"] * (len(lines) > MOST)]


class Tidy:
    """An object whose `dir`, and so Tab, offers what is made for users, and whose public methods check their
    arguments."""

    INTERNAL: ClassVar[frozenset[str]] = frozenset()
    """public names that only dinfer itself uses"""

    def __init_subclass__(cls, called: str = "", **kwargs: Any) -> None:
        """`called`: how users come to it, for messages; by default the name of the class."""
        super().__init_subclass__(**kwargs)
        check_calls(cls, called or cls.__name__.lower(), cls.INTERNAL)

    def __dir__(self) -> list[str]:
        hidden = {*self.INTERNAL, "INTERNAL"}
        return [name for name in super().__dir__() if name not in hidden]


class Displayable(ABC):
    """An object whose `str` is also its repr and, escaped, its HTML form. Where it is displayed, a warning or an error
    begins with its mark."""

    @property
    def severity(self) -> Severity:
        """How grave it is what this says."""
        return Severity.NOTE

    @abstractmethod
    def __str__(self) -> str: ...

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_text(str(self), self.severity)

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        """Called by IPython for its text form."""
        marked = self.severity.marked(str(self), colour=takes_colour(sys.stdout))
        for number, line in enumerate(marked.split("\n")):
            if number:
                printer.break_()
            printer.text(line)


class DisplayableText(str, Displayable):
    """A `str` that shells show without quotation marks."""

    __slots__ = ()
    __str__, __repr__ = str.__str__, str.__str__


NUMBER = re.compile(r"[-+−]?[\d.,]*\d(e[-+]?\d+)?( ?(%|s|ms|MB|kB))?|[-+−]?(nan|inf)|[-–?]?")
"""cells that are right-aligned where their whole column consists of them"""


PLAIN = re.compile(r"[-+−]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?(e[-+−]?\d+)?|[-+−]?(nan|inf)")
"""a cell that is a number and nothing else"""

NOTHING = ("", "–")


class Table(Tabular, Displayable):
    """Cells under column names; names of "" print no header line. A cell may have several lines. `columns` and `rows`
    are all of it.

    Its text does not depend on the console's width. The widths of cells (中文) are rich's; rich's own Table would take
    a millisecond per row, which is half a minute for all differences of a large KV, and breaks lines.
    `shown`: how many rows are displayed; None: all. `about`: what columns mean, by name; a notebook shows it when the
    mouse is over the name.
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        shown: int | None = None,
        about: Mapping[str, str] | None = None,
    ) -> None:
        self.columns, self._shown, self.about = tuple(columns), shown, about or {}
        self.rows = [tuple(map(str, row)) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        rows = [self.columns] * any(self.columns) + self.rows[: self._shown]
        lines = [line for row in rows for line in zip_longest(*(c.split("\n") for c in row), fillvalue="")]
        columns = [_aligned(cells, any(self.columns)) for cells in zip(*lines, strict=True)]
        text = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
        return "\n".join([*text, *self._more()])

    def _repr_html_(self) -> str:
        rows = [_html_row(self.columns, "th", self.about)] * any(self.columns)
        rows += [_html_row(row, "td") for row in self.rows[: self._shown]]
        return f"<table>{''.join(rows)}</table>{''.join(f'<div>{escape(one)}</div>' for one in self._more())}"

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        """A column of numbers alone is one of numbers."""
        columns = [_plain_values(cells) for cells in zip(*self.rows, strict=True)]
        return self.columns, zip(*columns, strict=True)

    def _more(self) -> list[str]:
        hidden = len(self.rows[self._shown :]) if self._shown is not None else 0
        return [f"and {hidden:,} more: .table(None) shows all"] * bool(hidden)


def _plain_values(cells: Sequence[str]) -> Sequence[Any]:
    """TableRow of a column as numbers, if all are numbers or empty and some are; else as they are."""
    given = [cell for cell in cells if cell not in NOTHING]
    if not given or not all(map(PLAIN.fullmatch, given)):
        return cells
    texts = {cell: cell.replace(",", "").replace("−", "-") for cell in given}
    is_whole = all(text.lstrip("+-").isdigit() for text in texts.values())
    values = {cell: int(text) if is_whole else float(text) for cell, text in texts.items()}
    return [values.get(cell) for cell in cells]


def _aligned(cells: Sequence[str], has_header: bool) -> list[str]:
    """TableRow of a column, padded to the same width: to the right if all are numbers, the header aside."""
    from rich.cells import cell_len

    widths = [cell_len(cell) for cell in cells]
    widest = max(widths)
    padding = [" " * (widest - width) for width in widths]
    numeric = all(NUMBER.fullmatch(cell) for cell in cells[has_header:])
    return [pad + cell if numeric else cell + pad for cell, pad in zip(cells, padding, strict=True)]


def _html_row(cells: Sequence[str], tag: str, about: Mapping[str, str] | None = None) -> str:
    titles = [f' title="{escape(about[cell])}"' if about and cell in about else "" for cell in cells]
    found = (f"<{tag}{title}>{escape(cell)}</{tag}>" for cell, title in zip(cells, titles, strict=True))
    return f"<tr>{''.join(found)}</tr>"


class Composed(Displayable):
    """An object that is shown as texts and tables, one below another; in notebooks its tables are HTML tables."""

    @abstractmethod
    def _parts(self) -> Iterable[str | Displayable]:
        """What is shown, from top to bottom; an empty text is left out."""

    def __str__(self) -> str:
        return "\n".join(filter(None, map(str, self._parts())))

    def _repr_html_(self) -> str:
        shown = (
            html_text(part) if isinstance(part, str) else part._repr_html_()
            for part in self._parts()
            if part != ""
        )
        return f"<div>{badge(self.severity)}{''.join(shown)}</div>"


def takes_colour(stream: TextIO) -> bool:
    """Whether it is a terminal whose user has not switched colours off (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


class Announced(Displayable):
    """An object that prints its text when it is made, and is not displayed a second time under the same cell."""

    _announced: tuple[int | None, str] | None = None

    def announce(self) -> None:
        """Print the text now."""
        print(self)
        self._announced = _cell(), str(self)

    def _ipython_display_(self) -> None:
        """Called by IPython to display the object; NotImplementedError leaves the display to the other methods."""
        if self._announced != (_cell(), str(self)):
            raise NotImplementedError


def _cell() -> int | None:
    """The number of the running cell; None outside IPython."""
    shell = ipython()
    return shell.execution_count if shell else None


def print_under_cell(text: str) -> None:
    """Print from any thread: in a notebook under the cell that runs, or ran last, where IPython would print under the
    cell that started the thread."""
    kernel = getattr(ipython(), "kernel", None)
    try:
        content = {"name": "stdout", "text": f"{text}\n"}
        kernel.session.send(kernel.iopub_socket, "stream", content, parent=kernel.get_parent("shell"))  # type: ignore[union-attr]
    except AttributeError:  # no notebook
        print(text, flush=True)


class Plot(Protocol):
    """A figure that notebooks draw. `figure` is plotly's and can be changed."""

    figure: Any

    def save(self, path: str | Path) -> Path:
        """Write it to a file: an HTML page if its name ends in .html, else a picture, .svg."""

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]: ...


Plotter = Callable[[str, Any], Plot]
"""Draws the figure of that name of a result."""

_plotters: list[Plotter] = []


def use_plotter(plotter: Plotter) -> None:
    """Have that draw the figures of results. Views draw them, but stand above results: dinfer/__init__.py hands them
    in."""
    _plotters[:] = [plotter]


def plotted(name: str, result: object) -> Plot:
    """The figure of that name of a result. Raises NotPossible where nothing can draw it."""
    if not _plotters:
        raise NotPossible(f"nothing draws the figure {name!r}: import dinfer, which brings plotly's figures.")
    return _plotters[0](name, result)

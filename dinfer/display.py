"""How results look in consoles and notebooks: texts, tables, HTML; and objects that a `with` statement closes."""

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Self

from dinfer.errors import ipython


class Closing:
    """An object that has to be closed; usable in a `with` statement."""

    def close(self) -> None:
        """Release what it holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def html_text(text: str) -> str:
    """Text as HTML that keeps lines and spaces. Long lines break between words; a notebook's own style would break
    inside `block c2 l1`."""
    style = "margin:0;white-space:pre-wrap;word-break:normal;overflow-wrap:break-word"
    return f'<pre style="{style}">{escape(text)}</pre>'


SHOWN = 3


def listed(sentences: Sequence[str]) -> str:
    """The first SHOWN sentences, and how many more there are."""
    more = [f"and {len(sentences) - SHOWN} more"] * (len(sentences) > SHOWN)
    return "; ".join([*sentences[:SHOWN], *more])


class Displayable:
    """An object whose `str` is also its repr and, escaped, its HTML form."""

    def __str__(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_text(str(self))


class DisplayableText(str, Displayable):
    """A `str` that shells show without quotation marks."""

    __slots__ = ()
    __str__, __repr__ = str.__str__, str.__str__


NUMBER = re.compile(r"[-+−]?[\d.,]*\d(e[-+]?\d+)?( ?(%|s|ms|MB|kB))?|[-+−]?(nan|inf)|[-–?]?")
"""cells that are right-aligned where their whole column consists of them"""


class Table(Displayable):
    """Cells under column names, with as many columns as `columns`; names of "" print no header line.

    Its text has no line breaks but those in cells, whatever the width of the console: the layout is rich's.
    `shown`: how many rows are displayed; None: all.
    """

    def __init__(
        self, columns: Sequence[str], rows: Iterable[Sequence[object]], shown: int | None = None
    ) -> None:
        self.columns, self._shown = tuple(columns), shown
        self.rows = [tuple(map(str, row)) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        # Loaded only here: importing it takes as long as the rest of `import dinfer`.
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        laid_out = RichTable.grid(padding=(0, 2, 0, 0))
        laid_out.show_header = any(self.columns)
        for number, name in enumerate(self.columns):
            numeric = all(NUMBER.fullmatch(row[number]) for row in self.rows)
            laid_out.add_column(Text(name), justify="right" if numeric else "left", no_wrap=True)
        for row in self.rows[: self._shown]:
            laid_out.add_row(*map(Text, row))
        out = io.StringIO()
        Console(file=out, width=1_000_000, color_system=None, force_jupyter=False).print(laid_out)
        return "\n".join([*(line.rstrip() for line in out.getvalue().splitlines()), *self._more()])

    def _repr_html_(self) -> str:
        rows = [_html_row(self.columns, "th")] * any(self.columns)
        rows += [_html_row(row, "td") for row in self.rows[: self._shown]]
        return f"<table>{''.join(rows)}</table>{''.join(f'<div>{escape(one)}</div>' for one in self._more())}"

    def _more(self) -> list[str]:
        hidden = len(self.rows[self._shown :]) if self._shown is not None else 0
        return [f"and {hidden:,} more: .table(None) shows all"] * bool(hidden)


def _html_row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


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

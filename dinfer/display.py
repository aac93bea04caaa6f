"""Closing: what ends at the end of a `with`, whatever happened in it."""

from collections.abc import Sequence
from html import escape
from typing import Self

from dinfer.errors import ipython


class Closing:
    """Something that has to be closed."""

    def close(self) -> None:
        """End it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def html_text(text: str) -> str:
    """A text as HTML: its lines and spaces as they are, long lines broken between words, where a notebook's own style
    for texts would break inside `block c2 l1`."""
    style = "margin:0;white-space:pre-wrap;word-break:normal;overflow-wrap:break-word"
    return f'<pre style="{style}">{escape(text)}</pre>'


SHOWN = 3


def listed(sentences: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = [f"and {len(sentences) - SHOWN} more"] * (len(sentences) > SHOWN)
    return "; ".join([*sentences[:SHOWN], *more])


class Displayable:
    """Something with a text, which is its HTML form too."""

    def __str__(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_text(str(self))


class DisplayableText(str, Displayable):
    """A text that is shown as it is, without quotation marks."""

    __slots__ = ()
    __str__, __repr__ = str.__str__, str.__str__


class Announced(Displayable):
    """Something that says what it is as soon as it is made, and is not shown a second time under the same cell."""

    _announced: tuple[int | None, str] | None = None

    def announce(self) -> None:
        """Print its text."""
        print(self)
        self._announced = _cell(), str(self)

    def _ipython_display_(self) -> None:
        """Called by IPython to show it; NotImplementedError has it shown as everything else."""
        if self._announced != (_cell(), str(self)):
            raise NotImplementedError


def _cell() -> int | None:
    """The number of the cell that runs, if this is IPython."""
    shell = ipython()
    return shell.execution_count if shell else None

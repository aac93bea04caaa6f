"""One scale of severity for all that is shown: in the panel, in cells, still pictures, reports, logs and the terminal.

Each level has a word, an icon and colours; the colours are never the only sign.
"""

from enum import IntEnum
from typing import NamedTuple


class Tint(NamedTuple):
    """The colours of a message, as #rrggbb."""

    text: str
    back: str


class Severity(IntEnum):
    """How grave a message is; of several, the gravest is their maximum."""

    OK = 0
    """what was asked holds: the ranks hold the same KV"""
    NOTE = 1
    """nothing is wrong: what happened, or that there is nothing to see or to do yet"""
    WARNING = 2
    """results may be late, or not what the model makes: a slow rank or link, an armed fault, an edit by hand, NaN"""
    ERROR = 3
    """a result is wrong or the run cannot go on: a difference between ranks, changed bytes, a hang, a failure"""

    @property
    def word(self) -> str:
        return self.name.lower()

    @property
    def icon(self) -> str:
        return ICONS[self]

    @property
    def mark(self) -> str:
        """Icon and word, for example `✖ error`."""
        return f"{self.icon} {self.word}"

    def tint(self, *, dark: bool) -> Tint:
        """The colours on a light or a dark page; text and background of one tint can be read on any page."""
        return (DARK if dark else LIGHT)[self]

    def marked(self, text: str, *, colour: bool = False) -> str:
        """The text as a console or a log shows it: a warning or an error begins with its mark. `colour`: the mark in
        ANSI colours."""
        if self < Severity.WARNING or not text:
            return text
        return f"{self.painted(self.mark) if colour else self.mark}: {text}"

    def painted(self, text: str) -> str:
        """The text in ANSI colours."""
        return f"\x1b[{ANSI[self]}m{text}\x1b[0m"


ICONS = ("✓", "ⓘ", "⚠", "✖")

ANSI = ("32", "36", "33", "1;31")

LIGHT = (
    Tint("#1b5e20", "#e6f4ea"),
    Tint("#3c4043", "#eef0f3"),
    Tint("#6b4300", "#fff3d6"),
    Tint("#8c1d18", "#fdecea"),
)

DARK = (
    Tint("#c8ecd0", "#12351c"),
    Tint("#dfe3e8", "#2b2f36"),
    Tint("#ffe2a8", "#463205"),
    Tint("#ffd9d4", "#4a1512"),
)


def style_variables(*, dark: bool) -> str:
    """The colours as CSS custom properties, for example `--dinfer-error-text`."""
    tints = [(level.word, level.tint(dark=dark)) for level in Severity]
    return " ".join(
        f"--dinfer-{word}-text: {tint.text}; --dinfer-{word}-back: {tint.back};" for word, tint in tints
    )

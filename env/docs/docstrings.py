"""Docstrings as reStructuredText: plain text with `code`, lists and indented examples, and no other markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CODE = re.compile(r"(``.+?``|`[^`\n]+`)")
_MARKUP = re.compile(r"([\\*_|`])")
_ITEM = re.compile(r"(\* |- |\d+\. )")


def as_rst(lines: Sequence[str]) -> list[str]:
    """Paragraphs and lists stay; what is indented becomes a literal block; nothing is taken for markup but `code`."""
    found: list[str] = []
    for paragraph in _paragraphs(lines):
        if paragraph[0][0].isspace():
            found += ["::", "", *(f"    {line}" for line in paragraph), ""]
        else:
            found += [*_prose(paragraph), ""]
    return found


def is_noise(member: object) -> bool:
    """Whether a member's docstring is one that Python has made up, or belongs to another package."""
    text = getattr(member, "__doc__", None) or ""
    made_up = text.startswith(("Alias for field number", "Create new instance of"))
    owner = getattr(member, "__module__", None) or "dinfer"
    return made_up or (callable(member) and not str(owner).startswith("dinfer"))


def _paragraphs(lines: Sequence[str]) -> list[list[str]]:
    """Runs of lines without an empty one; a change from flush to indented begins a new one, but in a list."""
    found: list[list[str]] = [[]]
    for line in lines:
        if not line.strip():
            found.append([])
            continue
        last = found[-1]
        if last and line[0].isspace() != last[0][0].isspace() and not _ITEM.match(last[0]):
            found.append([])
        found[-1].append(line)
    return [paragraph for paragraph in found if paragraph]


def _prose(paragraph: Sequence[str]) -> list[str]:
    """Escaped as a whole, since `code` may go over the end of a line; items of a list are set apart."""
    items: list[list[str]] = [[]]
    for line in paragraph:
        if _ITEM.match(line):
            items.append([])
        items[-1].append(line.strip())
    found: list[str] = []
    for item in filter(None, items):
        mark = _ITEM.match(item[0])
        text = " ".join(item)
        head = mark[0] if mark else ""
        found += [f"{head}{_escaped(text[len(head) :])}", ""]
    return found


def _escaped(text: str) -> str:
    pieces = _CODE.split(text)
    return "".join(
        _literal(piece) if number % 2 else _MARKUP.sub(r"\\\1", piece) for number, piece in enumerate(pieces)
    )


def _literal(piece: str) -> str:
    """What stands between backticks, without spaces at its ends, which a literal may not have."""
    code = piece.strip("` ")
    return f"\\ ``{code}``\\ " if code else _MARKUP.sub(r"\\\1", piece)
